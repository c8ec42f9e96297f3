#!/usr/bin/env bash
# The paper's unpublished MAE ViT-S: 800 epochs of ImageNet-1k.
#   DATA=$IMAGENET OUT=runs/mae_small bash scripts/pretrain_mae_small.sh [flags of main_pretrain.py]
#   SLURM="--partition gpu" NODES=2 DATA=... OUT=... bash scripts/pretrain_mae_small.sh
# scripts/launch.sh lists the other settings. The same command resumes a stopped run.
#
# Recipe: MAE's (He et al. 2022, table 8; the defaults of main_pretrain.py) at effective batch 4096, with the 192 wide
# decoder of the authors of "Beyond [cls]". They do not state the epochs: 800 are MAE's default.
# Time: MAE's ViT-L takes 42 h on 64 V100 for as many epochs (its PRETRAIN.md), and ViT-S has a fourteenth of its
# encoder: loading images will probably be the bottleneck (--num_workers; the log states its share of the time).
# Expected accuracy: AbMILP 54.4, attentive probing with 12 heads 63.9 ("Beyond [cls]", table 7).
set -euo pipefail
source "$(dirname "$0")/env.sh"
source scripts/launch.sh
launch main_pretrain 4096 256 --model vit_small_patch16 --mask_ratio 0.75 --norm_pix_loss --epochs 800 --warmup_epochs 40 \
    --blr 1.5e-4 --weight_decay 0.05 --crop_scale 0.2 --keep_decoder "$@"
