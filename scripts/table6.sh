#!/usr/bin/env bash
# Table 6, rules that weight the patches: bash scripts/table6.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE ViT-B/16, DINO ViT-B/16 as the oracle. Data: ImageNet-1k; entropies over its 50,000 validation images.
# Protocol: paper.sh; weights of sum 1 for every rule.
# Expected, top-1 and entropy in nats: attn-mn 67.8, 5.14; attn-lcte 66.3, 4.77; ca1 65.2, 4.70; dino 70.9, 4.89;
# abmilp 71.6, 4.80. GPU-hours: the bank of Table 1, then 50,000 images; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
each probe $(encoders mae_vit_base_patch16)
each aggregate $(encoders mae_vit_base_patch16)
tables 6
finish
