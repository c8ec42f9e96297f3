#!/usr/bin/env bash
# The paper in miniature: probes and attention flow of MAE, of a joint-embedding encoder, and of fine-tuned MAE.
# usage: bash scripts/quickstart.sh [--short | --real]
#   (nothing)  the embedded demo: a few minutes on 2 CPU cores, no downloads beyond the package index
#   --short    the same with few images and epochs: a test that everything runs; its numbers mean nothing
#   --real     Imagenette and the published MAE and DINO ViT-B: downloads 1.1 GB; hours without a GPU
set -euo pipefail
mode=${1:-}
usage() { sed -n '/^# usage/s/^# //p; /^#   /s/^# //p' "$0"; }
case "$mode" in
    "" | --short | --real) ;;
    --help | -h) usage; exit ;;
    *) echo "unknown option $mode" >&2; usage >&2; exit 2 ;;
esac
source "$(dirname "$0")/env.sh"
workers=$(python -c 'import os; print(min(8, max(0, os.cpu_count() - 2)))')

case "$mode" in
    "" | --short)
        out=output_dir/quickstart train=4000 val=1000 epochs=12
        if [ "$mode" = --short ]; then out=output_dir/quickstart_short train=400 val=100 epochs=2; fi
        python scripts/make_demo_data.py "$out/data" --train $train --val $val
        data="--data_path $out/data --dataset demo --model vit_demo_patch8 --amp float32"
        weights=(demo/mae.safetensors demo/moco.safetensors demo/mae_ft.safetensors) labels=(MAE MoCo-v3 MAE-FT)
        recipe="--batch_size 100 --accum_iter 2 --epochs $epochs --warmup_epochs 1 --blr 30 --eval_every $epochs"
        ;;
    --real)
        out=output_dir/quickstart_real
        mkdir -p "$out/data"
        data="--data_path $out/data --dataset imagenette --model vit_base_patch16"
        weights=(mae_vit_base_patch16 dino_vit_base_patch16) labels=(MAE DINO)
        recipe="--batch_size 256 --epochs 20 --warmup_epochs 2 --blr 3 --eval_every 5"
        ;;
esac

attention() {
    echo "--- attention flow of ${labels[*]}"
    rm -rf "$out/attention"
    python main_analyze_attention.py $data --num_workers "$workers" --batch_size 50 --metrics all --output_dir "$out/attention" \
        --finetune "${weights[@]}" --label "${labels[@]}"
}
# probe I: probes on the encoder of this index
runs=()
for label in "${labels[@]}"; do runs+=("$label=$out/probes/$label"); done
probe() {
    local label=${labels[$1]}
    echo "--- probes on $label: [cls], average patch, AbMILP, three seeds of each, one pass"
    rm -rf "$out/probes/$label"
    python main_linprobe.py $data $recipe --num_workers "$workers" --finetune "${weights[$1]}" \
        --cls_features cls pos abmilp --seeds 0 1 2 --seeds_vary weights --output_dir "$out/probes/$label"
}
if [ "$mode" = --real ]; then
    attention
    for i in "${!labels[@]}"; do probe "$i"; done
else  # the demo's networks are too small for several threads: two programs at a time, on half of the cores each
    export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
    { attention; probe 2; } &
    other=$!
    trap 'kill "$other" 2> /dev/null || true' EXIT
    probe 0
    probe 1
    wait "$other"
    trap - EXIT
    unset OMP_NUM_THREADS
fi

echo "--- results"
python scripts/show_maps.py "${runs[@]}" --output "$out/maps.png"
python scripts/make_tables.py --runs "${runs[@]}" --output "$out/table.md"
[ "$mode" != --short ] || echo "short mode only tests that everything runs: its numbers mean nothing"
echo "table:   $out/table.md"
echo "figures:" "$out"/attention/*.png "$out/maps.png"
