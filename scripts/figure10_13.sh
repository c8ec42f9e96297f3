#!/usr/bin/env bash
# Figures 10 to 13, attention flow of three sizes: bash scripts/figure10_13.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: ViT-S and B of MAE, MAE-FT, DINO, MoCo-v3, iBOT; ViT-L of MAE, MAE-FT, iBOT; own are MAE S and all MAE-FT
# (scripts/pretrain_mae_small.sh, scripts/finetune_mae_cls.sh). Data and panels as in Figures 3 to 6, a row for each size.
# Expected: in ViT-S and ViT-L what Figures 3 to 6 show in ViT-B.
# GPU-hours: 50,000 images for each encoder; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
models=$(encoders {mae,mae_ft,dino,mocov3,ibot}_vit_{small,base}_patch16 {mae,mae_ft,ibot}_vit_large_patch16)
each attend $models
lines figure10_13.pdf $models
finish
