#!/usr/bin/env bash
# Table 6, rules by which the patches are weighed: bash scripts/table6.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE ViT-B/16, DINO ViT-B/16 as the oracle. Data: ImageNet-1k; entropies over its 50,000 validation images.
# Expected, top-1 and entropy in nats: attn-mn 67.8, 5.14; attn-lcte 66.3, 4.77; ca1 65.2, 4.70; dino 70.9, 4.89;
# abmilp 71.6, 4.80. The table prints them beside what was measured.
source "$(dirname "$0")/paper.sh" "$@"
aggregate mae
python scripts/make_tables.py --table 6 "$out/aggregation/mae/aggregation.json" --output "$out/table6.md"
