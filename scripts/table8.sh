#!/usr/bin/env bash
# Table 8, localisation by [cls] attention and by AbMILP: bash scripts/table8.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE and BEiT-v2 ViT-B/16. Data: AbMILP trained on ImageNet-1k; boxes of its 50,000 validation images (BOXES).
# Protocol: paper.sh; the banks of Table 1.
# Expected, MaxBoxAccV2 in percent of [cls] and AbMILP: MAE 53.3, 59.4; BEiT-v2 44.3, 65.1.
# GPU-hours: the banks of Table 1, then 50,000 images each; printed before each run. Contours take the CPU.
source "$(dirname "$0")/paper.sh" "$@"
each probe $(encoders {mae,beitv2}_vit_base_patch16)
each localise $(encoders {mae,beitv2}_vit_base_patch16)
tables 8
finish
