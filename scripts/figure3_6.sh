#!/usr/bin/env bash
# Figures 3 to 6, attention flow block by block: bash scripts/figure3_6.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: ViT-B of MAE, MAE-FT (own: scripts/finetune_mae_cls.sh base), DINO, MoCo-v3, iBOT. Data: the 50,000 validation images
# of ImageNet-1k. Nothing is trained. Panels: [cls]-[cls] attention, [cls]-patch entropy, relative patch self-attention,
# patch-patch entropy.
# Expected: [cls] self-attention of MAE and MAE-FT far above the others; [cls] entropy of MAE close to ln 196 = 5.28, that of
# the others and of MAE-FT falling in late blocks; patch self-attention of MAE highest; patch entropy of MAE and MAE-FT below.
# GPU-hours: 50,000 images for each encoder; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
models=$(encoders {mae,mae_ft,dino,mocov3,ibot}_vit_base_patch16)
each attend $models
lines figure3_6.pdf $models
finish
