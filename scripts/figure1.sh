#!/usr/bin/env bash
# Figure 1, baseline and AbMILP as bars: bash scripts/figure1.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE, BEiT-v2, iBOT, MoCo-v3 ViT-B (first version of the paper); I-JEPA H, CAPI L (ICCV). Data: ImageNet-1k.
# Protocol: paper.sh; the banks of Table 1. The baseline is [cls], of I-JEPA and CAPI the average patch;
# CAPI's tokens after its last norm.
# Expected: MAE 68.0, 71.6; BEiT-v2 78.9, 80.9; iBOT 77.8, 77.9; MoCo-v3 75.1, 75.1 (bars, to 0.1); AbMILP of I-JEPA 79.2, CAPI 82.4.
# GPU-hours: as Table 1, and none where its banks are there; printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
each probe $(encoders {mae,beitv2,ibot,mocov3}_vit_base_patch16 ijepa_vit_huge_patch14 capi_vit_large_patch14)
tables fig1
bars
finish
