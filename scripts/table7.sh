#!/usr/bin/env bash
# Table 7, AbMILP and attentive probing with 1 and 12 heads: bash scripts/table7.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE ViT-S (own: scripts/pretrain_mae_small.sh), B, L, H; BEiT-v2 B, I-JEPA H, CAPI L. Data: ImageNet-1k.
# Protocol: paper.sh; the banks of Table 1, of CAPI on tokens after its last norm.
# Expected, AbMILP, 1 head, 12 heads: MAE S 54.4, 53.6, 63.9; B 71.6, 71.4, 75.4; L 77.4, 77.6, 79.7; H 78.1, 78.3, 80.0;
# BEiT-v2 80.9, 81.0, 81.8; I-JEPA 79.2, 79.5, 79.7; CAPI 82.4, 81.6, 82.7.
# GPU-hours: as Table 1, and none where its banks are there; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
each probe $(encoders mae_vit_{small_patch16,base_patch16,large_patch16,huge_patch14} beitv2_vit_base_patch16 \
    ijepa_vit_huge_patch14 capi_vit_large_patch14)
tables 7
finish
