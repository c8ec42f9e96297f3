#!/usr/bin/env bash
# Figure 7, divergences between the rules of Table 6: bash scripts/figure7.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models, data and GPU-hours as in Table 6; mean KL(row || column) over the 50,000 validation images.
# Expected: the paper gives no numbers beside its picture; the diagonal is zero.
source "$(dirname "$0")/paper.sh" "$@"
model=$(encoders mae_vit_base_patch16)
each probe ${model%% *}
each aggregate ${model%% *}
publish "$out/aggregation/${model%% *}/kl.pdf" figure7.pdf
finish
