#!/usr/bin/env bash
# Depth: accuracy, attention flow, frequency and mutual information of every block:
# bash scripts/figure_depth.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: ViT-B of MAE, MAE-FT, DINO, MoCo-v3, iBOT. Data: ImageNet-1k; probes at the protocol of paper.sh on all 12 blocks.
# Expected: not in the paper, which probes the last block; Park et al. (2023) find that early blocks of masked image
# modelling and late blocks of joint embedding hold their information.
# GPU-hours: one pass of probes and one of all metrics for each encoder; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
models=$(encoders {mae,mae_ft,dino,mocov3,ibot}_vit_base_patch16)
each deep_probes $models
each attend_all $models
depth $models
finish
