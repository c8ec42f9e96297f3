#!/usr/bin/env bash
# Measure encoders for docs/claims.md: probes, attention, depth, perturbed images, weights of rules; all recorded.
# usage: bash scripts/study_measure.sh FOLDER [LABEL=WEIGHTS ...]
# Without LABEL=WEIGHTS, the encoders are those of scripts/study_pretrain.sh in FOLDER and those of demo/. The same command
# resumes what was stopped and skips what is recorded. Settings, from the environment:
#   RECORDS   gets a folder for each encoder, which `python scripts/claims.py --records` reads (default: FOLDER/records)
#   ORACLE    encoder whose [cls] attention the head dino takes (default: MoCo-v3 of demo/)
#   DATA      folder with train/, val/ and boxes.csv (default: demo scenes, TRAIN=4000 and VAL=1000, made in FOLDER)
#   EPOCHS    epochs of the probes (default: 16; those at every block: half)
#   PARTS     what to measure, in this order (default: all)
set -euo pipefail
source "$(dirname "$0")/env.sh"
out=${1:?usage: bash scripts/study_measure.sh FOLDER [LABEL=WEIGHTS ...]}
records=${RECORDS:-$out/records} oracle=${ORACLE:-demo/moco.safetensors}
parts=${PARTS:-rules learned attention depth decoder cues aggregation scaling deep attentive}
encoders=("${@:2}")
if [ ${#encoders[@]} = 0 ]; then
    [ -n "${DATA:-}" ] ||
        encoders=(demo-mae=demo/mae.safetensors demo-moco=demo/moco.safetensors demo-mae-ft=demo/mae_ft.safetensors)
    for weights in "$out"/weight*-seed*/encoder.safetensors; do
        encoders+=("$(basename "$(dirname "$weights")")=$weights")
    done
fi
mkdir -p "$records"
[ -f "$records/encoders.toml" ] || cp --remove-destination results/study/encoders.toml "$records"
images=${DATA:-$out/probing} scenes=(--train "${TRAIN:-4000}" --val "${VAL:-1000}" --seed 0)
data=(--data_path "$images" --num_workers 0)
if [ -z "${DATA:-}" ]; then
    data+=(--dataset demo)
    [ -d "$images" ] || python scripts/make_demo_data.py "$images" "${scenes[@]}"
fi
oracles=(--oracle "$oracle" --oracle_model vit_demo_patch8)
own=(attn-mn attn-lcte ca1)             # rules of the encoder's own attention
free=(far norm lowfreq fiedler received) # rules without labels and [cls]

# run NAME PROGRAM FLAG...; measure NAME PROGRAM FLAG...: with a record, once
run() { python "$2" "${data[@]}" "${@:3}" --output_dir "$out/measured/$label/$1"; }
measure() {
    [ ! -d "$records/$label/$1" ] || return 0
    run "$@"
    python scripts/record.py "$out/measured/$label/$1" --results "$records/$label/$1"
}
# probe NAME FLAG...: every head has its own rate, chosen on held-out images; seeds vary weights, order and augmentation
probing() {
    "$1" "$2" main_linprobe.py --model vit_demo_patch8 --finetune "$weights" --amp bfloat16 --val_fraction 0.2 \
        --batch_size 200 --epochs "$epochs" --warmup_epochs 1 --eval_every "$epochs" --cache_views 1 --seeds 0 1 2 \
        --resume auto "${@:3}"
}
probe() { probing measure "$@"; }
attend() {
    measure attention main_analyze_attention.py --model vit_demo_patch8 --finetune "$weights" --amp float32 \
        --label "$label" --metrics all --batch_size 50 --num_examples 0 "$@"
}
# at_blocks FLAG...: a central crop without flips, so that seeds vary weights and order alone
at_blocks() {
    local epochs=$(((epochs + 1) / 2))
    probe depth --blr 30 --crop center --no_hflip "$@"
}

rules() { probe rules --blr 30 100 300 1000 "${oracles[@]}" --cls_features cls pos "${own[@]}" dino "${free[@]}"; }
learned() { probe learned --blr 3 10 30 100 --cls_features abmilp abmilp:branches=4; }
attention() { attend; }
depth() { at_blocks --return_block 0 1 2 3 4 5 --cls_features cls pos abmilp; }
decoder() { # MAE's decoder as blocks 6 and 7, under a label of its own
    grep -qa decoder_blocks "$weights" || return 0
    local label=$label-decoder
    attend --decoder
    at_blocks --decoder --return_block 0 1 2 3 4 5 6 7 --cls_features cls pos abmilp
}
cues() { # probes of scenes whose outline shows the class, too; tested where the cues conflict, and perturbed
    [ -z "${DATA:-}" ] && [ ! -d "$records/$label/cues" ] || return 0
    local folder=$out/measured/$label/cues data
    python scripts/make_demo_data.py "$out/agree" --train "${TRAIN:-2000}" --val "${VAL:-500}" --cues agree
    python scripts/make_demo_data.py "$out/conflict" --train 10 --val "${VAL:-500}" --cues conflict
    data=(--data_path "$out/agree" --dataset demo --num_workers 0)
    probing run cues --blr 30 100 --cls_features cls pos abmilp
    python scripts/evaluate_probe.py "$folder" "${data[@]}" --output "$folder/agree.json" \
        --perturb lowpass:{0.2,0.4} highpass:{0.1,0.2} noise:{0.1,0.3,0.5,0.7,0.9},0.2 shuffle:{2,4}
    data[1]=$out/conflict
    python scripts/evaluate_probe.py "$folder" "${data[@]}" --output "$folder/conflict.json"
    mkdir -p "$records/$label/cues"
    cp "$folder/agree.json" "$folder/conflict.json" "$records/$label/cues"
}
aggregation() {
    measure aggregation main_analyze_aggregation.py --amp float32 --probes "$out/measured/$label/learned" \
        --probe_heads abmilp "${oracles[@]}" --rules pos "${own[@]}" dino "${free[@]}" \
        --boxes "$images/boxes.csv" --num_images 500 --num_examples 0 --batch_size 50 --loc_workers 0 --loc_step 0.01
}
scaling() { probe scaling --blr 10 30 --cls_features abmilp abmilp:{branches={2,4},depth={2,3}}; }
deep() { probe deep --blr 10 30 --cls_features abmilp:depth=2,act=tanh abmilp:sa=both; }
attentive() { probe attentive --blr 1 3 10 30 --cls_features ap1 ap4; }

for part in $parts; do
    for encoder in "${encoders[@]}"; do
        label=${encoder%%=*} weights=${encoder#*=} epochs=${EPOCHS:-16}
        case $part:$label in
            attention:*) attention ;;
            *:demo-mae-ft | depth:demo-* | cues:demo-* | decoder:*-seed[1-9]) ;;
            depth:*weight0.* | cues:*weight0.* | scaling:*weight0.*) ;; # sums of losses: the last block alone
            deep:*weight0-* | attentive:*weight0-* | *:demo-mae) $part ;; # MAE alone, as in the paper's Tables 5 and 7
            deep:* | attentive:*) ;;
            *) $part ;;
        esac
    done
done
