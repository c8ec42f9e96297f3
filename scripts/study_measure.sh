#!/usr/bin/env bash
# Measure encoders of the demo's images for docs/claims.md: probes, depth, attention flow, aggregation; all recorded.
# usage: bash scripts/study_measure.sh FOLDER [LABEL=WEIGHTS ...]
# Without LABEL=WEIGHTS, the encoders are those of scripts/study_pretrain.sh in FOLDER and those of demo/. The same command
# resumes what was stopped and skips what is recorded. RECORDS (default FOLDER/records) gets a folder for each encoder,
# which `python scripts/claims.py --records` reads. ORACLE is the encoder whose [cls] attention the head dino takes.
set -euo pipefail
source "$(dirname "$0")/env.sh"
out=${1:?usage: bash scripts/study_measure.sh FOLDER [LABEL=WEIGHTS ...]}
records=${RECORDS:-$out/records} oracle=${ORACLE:-$out/weight1-seed0/encoder.safetensors}
encoders=("${@:2}")
if [ ${#encoders[@]} = 0 ]; then
    encoders=(demo-mae=demo/mae.safetensors demo-mae-ft=demo/mae_ft.safetensors)
    for weights in "$out"/weight*-seed*/encoder.safetensors; do
        encoders+=("$(basename "$(dirname "$weights")")=$weights")
    done
fi
mkdir -p "$records"
[ -f "$records/encoders.toml" ] || cp --remove-destination results/study/encoders.toml "$records"
[ -d "$out/probing" ] || python scripts/make_demo_data.py "$out/probing" --train 4000 --val 1000 --seed 0

data=(--data_path "$out/probing" --dataset demo --num_workers 0)
oracles=(--oracle "$oracle" --oracle_model vit_demo_patch8)
rules=(attn-mn attn-lcte ca1 dino far norm lowfreq fiedler received)

# measure NAME PROGRAM FLAG...: one run and its record
measure() {
    [ ! -d "$records/$label/$1" ] || return 0
    python "$2" "${data[@]}" "${@:3}" --output_dir "$out/measured/$label/$1"
    python scripts/record.py "$out/measured/$label/$1" --results "$records/$label/$1"
}
# probe NAME FLAG...: every head has its own rate, chosen on held-out images
probe() {
    measure "$1" main_linprobe.py --model vit_demo_patch8 --finetune "$weights" --amp bfloat16 --val_fraction 0.2 \
        --batch_size 200 --epochs 16 --warmup_epochs 1 --eval_every 16 --seeds 0 1 2 --resume auto "${@:2}"
}
for encoder in "${encoders[@]}"; do
    label=${encoder%%=*} weights=${encoder#*=}
    # seeds vary weights, order and augmentation
    probe rules --cache_views 1 --blr 30 100 300 1000 "${oracles[@]}" --cls_features cls pos "${rules[@]}"
    probe learned --cache_views 1 --blr 3 10 30 100 --cls_features abmilp abmilp:branches=4
    measure attention main_analyze_attention.py --model vit_demo_patch8 --finetune "$weights" --amp float32 \
        --label "$label" --metrics all --batch_size 50 --num_examples 0
    measure aggregation main_analyze_aggregation.py --amp float32 --probes "$out/measured/$label/learned" \
        --probe_heads abmilp "${oracles[@]}" --rules pos "${rules[@]}" --boxes "$out/probing/boxes.csv" \
        --num_images 500 --num_examples 0 --batch_size 50 --loc_workers 0 --loc_step 0.01
    # MAE alone, as in the paper's Tables 5 and 7
    case $label in weight0-* | demo-mae) probe attentive --cache_views 1 --blr 1 3 10 30 --cls_features ap1 ap4 ;; esac
done
for encoder in "${encoders[@]}"; do
    label=${encoder%%=*} weights=${encoder#*=}
    case $label in weight0-* | demo-mae)
        probe deep --cache_views 1 --blr 3 10 30 --cls_features abmilp:depth=2 abmilp:depth=2,act=tanh abmilp:sa=both ;;
    esac
    # all blocks; seeds vary weights and order
    probe depth --cache_views 1 --blr 10 30 100 300 --crop center --no_hflip --return_block 0 1 2 3 4 5 \
        --cls_features cls pos abmilp alf
done
