#!/usr/bin/env bash
# Train the study's encoders, MAE, MoCo-v3 and sums of their losses, like for like on the demo's images; measure them.
# usage: bash scripts/study_pretrain.sh [FOLDER [WEIGHT:SEED ...]]
# FOLDER (default output_dir/study) gets one run per weight and seed. The same command resumes what was stopped.
# AMP=float32 suits processors without bfloat16 units; with them (AMX), bfloat16 takes half the time.
set -euo pipefail
source "$(dirname "$0")/env.sh"
out=${1:-output_dir/study}
runs=("${@:2}")
[ ${#runs[@]} -gt 0 ] || runs=(0:0 1:0 0.5:0 0.25:0 0.75:0 0:1 1:1)
data=$out/data epochs=${EPOCHS:-20}
mkdir -p "$out"
python scripts/make_demo_data.py "$data" --train 8000 --val 2000 --seed 0

common=(--model vit_demo_patch8 --dataset demo --data_path "$data" --batch_size 128 --amp "${AMP:-bfloat16}"
    --num_workers 1 --epochs "$epochs" --warmup_epochs 2 --blr 2e-3 --save_every_minutes 5 --resume auto)
# views that keep the object and lose the colours, which otherwise tell images apart; half the patches are dropped
views=(--temperature 0.1 --projector_width 512 --view_scale 0.3 --view_grey 0.8 --view_drop 0.5)
for run in "${runs[@]}"; do
    weight=${run%:*} seed=${run#*:}
    contrast=()
    [ "$weight" = 0 ] || contrast=("${views[@]}")
    python main_pretrain.py "${common[@]}" --contrastive_weight "$weight" --seed "$seed" \
        ${contrast[@]+"${contrast[@]}"} --output_dir "$out/weight$weight-seed$seed"
done
bash scripts/study_measure.sh "$out"
python scripts/claims.py --records "$out/records"
