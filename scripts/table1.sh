#!/usr/bin/env bash
# Table 1, linear probing by [cls], average patch and AbMILP: bash scripts/table1.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE ViT-S (own: scripts/pretrain_mae_small.sh), B, L, H; SimMIM, MaskFeat, BEiT-v2 B; I-JEPA H, CAPI L, which have
# no [cls]; DINO, MoCo-v3, iBOT B. Data: ImageNet-1k. Protocol: paper.sh, one bank of all tables' heads for each encoder; CAPI's
# tokens after its last norm, as its public model returns them.
# Expected, [cls] and AbMILP: MAE B 67.8, 71.6; BEiT-v2 78.9, 80.9; MoCo-v3 75.1, 75.1; iBOT 77.8, 77.9; AbMILP of MAE S 54.4,
# L 77.4, H 78.1, I-JEPA 79.2, CAPI 82.4. The others are not known.
# GPU-hours: 350.4 million images for each encoder, 194.7 million for L and H; MAE B's bank has the attention of the oracle, too,
# which sees as many. Printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
each probe $(encoders mae_vit_{small_patch16,base_patch16,large_patch16,huge_patch14} simmim_vit_base_patch16 \
    maskfeat_vit_base_patch16 beitv2_vit_base_patch16 ijepa_vit_huge_patch14 capi_vit_large_patch14 dino_vit_base_patch16 \
    mocov3_vit_base_patch16 ibot_vit_base_patch16)
tables 1
finish
