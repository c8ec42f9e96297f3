#!/usr/bin/env bash
# Depth: accuracy, attention flow, frequency and mutual information of every block:
# bash scripts/figure_depth.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: ViT-B of MAE, MAE-FT, DINO, MoCo-v3, iBOT; MAE ViT-S (pretrain_mae_small.sh) through its decoder of 8 blocks.
# Data: ImageNet-1k; probes at the protocol of paper.sh on all blocks.
# Expected: not in the paper, which probes the last block; Park et al. (2023) find that early blocks of masked image
# modelling and late blocks of joint embedding hold their information.
# GPU-hours: one pass of probes and one of all metrics for each encoder; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
models=$(encoders {mae,mae_ft,dino,mocov3,ibot}_vit_base_patch16)
[ "$mode" = --smoke ] && models+=" mae_vit_demo_patch8/decoder" || models+=" mae_vit_small_patch16/decoder"
pretrain_decoder
each deep_probes $models
each attend_all $models
depth $models
finish
