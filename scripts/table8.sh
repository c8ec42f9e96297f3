#!/usr/bin/env bash
# Table 8, localisation by [cls] attention and by AbMILP: bash scripts/table8.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE and BEiT-v2 ViT-B/16. Data: AbMILP trained on ImageNet-1k; boxes of its 50,000 validation images (BOXES).
# Expected, MaxBoxAccV2 in percent of [cls] and AbMILP: MAE 53.3, 59.4; BEiT-v2 44.3, 65.1.
source "$(dirname "$0")/paper.sh" "$@"
localise mae
localise beitv2
python scripts/make_tables.py --table 8 "$out"/localization/{mae,beitv2}/aggregation.json --output "$out/table8.md"
