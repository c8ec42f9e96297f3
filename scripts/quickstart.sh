#!/usr/bin/env bash
# The paper in miniature: probes and attention flow of two encoders.
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
        weights=(demo/mae.safetensors demo/mae_ft.safetensors) labels=(MAE MAE-FT)
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

echo "--- attention flow of both encoders"
rm -rf "$out/attention"
python main_analyze_attention.py $data --num_workers "$workers" --batch_size 50 --metrics all --output_dir "$out/attention" \
    --finetune "${weights[@]}" --label "${labels[@]}"

# probe NAME WEIGHTS
probe() {
    echo "--- probes on $1: [cls], average patch, AbMILP, three seeds of each, one pass"
    rm -rf "$out/probes/$1"
    python main_linprobe.py $data $recipe --num_workers "$workers" --finetune "$2" \
        --cls_features cls pos abmilp --seeds 0 1 2 --seeds_vary weights --output_dir "$out/probes/$1"
}
runs=("${labels[0]}=$out/probes/${labels[0]}" "${labels[1]}=$out/probes/${labels[1]}")
if [ "$mode" = --real ]; then
    for i in 0 1; do probe "${labels[i]}" "${weights[i]}"; done
else  # the demo's networks are too small for several threads: one run on each half of the cores
    export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
    probe "${labels[0]}" "${weights[0]}" &
    other=$!
    trap 'kill "$other" 2> /dev/null || true' EXIT
    probe "${labels[1]}" "${weights[1]}"
    wait "$other"
    unset OMP_NUM_THREADS
fi

echo "--- results"
python scripts/show_maps.py "${runs[@]}" --output "$out/maps.png"
python scripts/make_tables.py --runs "${runs[@]}" --output "$out/table.md"
[ "$mode" != --short ] || echo "short mode only tests that everything runs: its numbers mean nothing"
echo "table:   $out/table.md"
echo "figures:" "$out"/attention/*.png "$out/maps.png"
