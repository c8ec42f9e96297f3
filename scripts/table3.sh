#!/usr/bin/env bash
# Table 3, aggregation entropy: bash scripts/table3.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE, SimMIM, BEiT-v2, DINO ViT-B; I-JEPA H and CAPI L, whose weights are uniform. Data: the 50,000 validation images
# of ImageNet-1k. Nothing is trained.
# Expected, nats: MAE 5.03, SimMIM 4.96, BEiT-v2 4.89, DINO 4.70; I-JEPA and CAPI 5.28 = ln 196, of their own 256 patches 5.545.
# GPU-hours: 50,000 images for each encoder; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
each attend $(encoders {mae,simmim,beitv2,dino}_vit_base_patch16 ijepa_vit_huge_patch14 capi_vit_large_patch14)
tables 3
finish
