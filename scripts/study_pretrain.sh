#!/usr/bin/env bash
# Train the study's encoders, MAE, MoCo-v3 and sums of their losses, like for like on the same images; measure them.
# usage: bash scripts/study_pretrain.sh [FOLDER [WEIGHT:SEED ...]]
# FOLDER (default output_dir/study) gets one run per weight and seed. The same command resumes what was stopped.
# Settings, from the environment:
#   DATA        image folder with train/, val/ and boxes.csv, such as Tiny ImageNet's (default: demo scenes)
#   AMP         float32 suits processors without bfloat16 units; with them (AMX), bfloat16 takes half the time (default)
#   EPOCHS      epochs of pretraining (default: 20)
#   SCENES      images of the demo (default: 8000)
#   PROBES      epochs of probes (default: 16), and more of scripts/study_measure.sh
# A test that everything runs, in some minutes: SCENES=400 EPOCHS=3 TRAIN=500 VAL=100 PROBES=2 bash scripts/study_pretrain.sh
set -euo pipefail
source "$(dirname "$0")/env.sh"
out=${1:-output_dir/study}
runs=("${@:2}")
[ ${#runs[@]} -gt 0 ] || runs=(0:0 1:0 0.5:0 0.25:0 0.75:0 0:1 1:1)
# views that keep the object; half the patches are dropped
views=(--temperature 0.1 --projector_width 512 --view_scale 0.3 --view_drop 0.5)
mkdir -p "$out"
if [ -n "${DATA:-}" ]; then
    data=(--data_path "$DATA")
else
    python scripts/make_demo_data.py "$out/data" --train "${SCENES:-8000}" --val 2000 --seed 0
    data=(--dataset demo --data_path "$out/data")
    views+=(--view_grey 0.8) # colours tell the scenes apart
fi
for run in "${runs[@]}"; do
    weight=${run%:*} seed=${run#*:}
    loss=(--contrastive_weight "$weight" "${views[@]}")
    [ "$weight" != 0 ] || loss=()
    [ "$weight" = 1 ] || loss+=(--keep_decoder)
    python main_pretrain.py --model vit_demo_patch8 "${data[@]}" --batch_size 128 --amp "${AMP:-bfloat16}" \
        --num_workers 1 --epochs "${EPOCHS:-20}" --warmup_epochs 2 --blr 2e-3 --save_every_minutes 5 --resume auto \
        --seed "$seed" "${loss[@]}" --output_dir "$out/weight$weight-seed$seed"
done
EPOCHS=${PROBES:-16} bash scripts/study_measure.sh "$out"
python scripts/claims.py --records "$out/records"
