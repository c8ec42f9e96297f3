#!/usr/bin/env bash
# Figure 9, maps of the rules of Table 6 over images: bash scripts/figure9.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models, data and GPU-hours as in Table 6; a random choice of validation images.
# Expected: MAE's mean [cls] map is almost uniform, the oracle's and AbMILP's lie on the object.
source "$(dirname "$0")/paper.sh" "$@"
model=$(encoders mae_vit_base_patch16)
each probe ${model%% *}
each aggregate ${model%% *}
publish "$out/aggregation/${model%% *}/maps.png" figure9.png
finish
