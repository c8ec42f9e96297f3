#!/usr/bin/env bash
# Table 5, AbMILP by depth and activation: bash scripts/table5.sh [--smoke | --slurm FLAG...]; see paper.sh
# Model: MAE ViT-B. Data: ImageNet-1k. Protocol: paper.sh; self-attention before AbMILP by SGD without momentum, in a run of
# its own. The 27 deep probes keep the tokens of 2,048 images after each of 54 layers in all, 1.2 GB each, and what their
# gradients take: where that does not fit, DEEP=apart trains them in three runs.
# Expected, depth 1 to 4: linear 71.6; ReLU 71.7, 71.5, 71.6; GELU 71.6, 71.6, 71.5; tanh 68.7, 66.7, 66.7; self-attention 74.8.
# GPU-hours: the bank of Table 1, then 350.4 million images for each other run; printed before each.
source "$(dirname "$0")/paper.sh" "$@"
model=$(encoders mae_vit_base_patch16)
each probe ${model%% *}
each deepen ${model%% *}
tables 5
finish
