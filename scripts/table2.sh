#!/usr/bin/env bash
# Table 2, transfer of baseline and AbMILP: bash scripts/table2.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models: MAE, SimMIM, BEiT-v2 ViT-B, I-JEPA H, CAPI L; the baseline is [cls], of the last two the average patch;
# CAPI's tokens after its last norm, as its public model returns them.
# Data: Food-101, COCO 2017, NUS-WIDE as ImageNet (paper.sh); ImageNet-1 % ($IMAGENET/1percent.txt), CUB, Cars, Pets by SGD
# without momentum, base rate 0.1, one batch of 1,024, which is normalised as one. FOOD101, COCO, NUS_WIDE, CUB200,
# STANFORD_CARS and OXFORD_PETS name their folders; data sets without one are left out. COCO and NUS-WIDE count by mean
# average precision. With --smoke, a tenth of the demo's training images.
# Expected: no values of this table are known. GPU-hours: printed before each run.
source "$(dirname "$0")/paper.sh" "$@"
sets=()
if [ "$mode" = --smoke ]; then
    each probe $(encoders)
    sets=(demo_few)
else
    for place in IMAGENET:imagenet1pct CUB200:cub200 STANFORD_CARS:stanford_cars OXFORD_PETS:oxford_pets FOOD101:food101 \
        COCO:coco NUS_WIDE:nus_wide; do
        variable=${place%%:*} name=${place#*:}
        if [ -z "${!variable:-}" ]; then
            echo "left out: $name; name its folder in $variable" >&2
        elif [ "$name" = imagenet1pct ] && [ ! -f "$IMAGENET/1percent.txt" ] && [ -z "${PRINT:-}" ]; then
            echo "left out: $name; $IMAGENET/1percent.txt is not there (SimCLR's list)" >&2
        else
            sets+=("$name")
        fi
    done
fi
for name in $(encoders {mae,simmim,beitv2}_vit_base_patch16 ijepa_vit_huge_patch14 capi_vit_large_patch14); do
    each transfer "${sets[@]/#/$name/}"
done
tables 2
finish
