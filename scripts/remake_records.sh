#!/usr/bin/env bash
# Make the demo's records anew, with the figures and tables that show them: bash scripts/remake_records.sh [--short]
#   (nothing)  results/quickstart and results/aggregation with their goldens, figures of docs/, tables
#   --short    compute the goldens' numbers and compare, in a minute (CI)
# All records are of the present commit, so that there must not be uncommitted changes. Numbers in the prose of pages are
# yours to update: make_tables.py and tests/test_make_tables.py name them.
set -euo pipefail
mode=${1:-}
case "$mode" in
    "" | --short) ;;
    *) sed -n '/^# Make/s/^# //p; /^#   /s/^# //p' "$0" >&2; exit 2 ;;
esac
source "$(dirname "$0")/env.sh"
if [ -z "$mode" ] && [ -n "$(git status --porcelain)" ]; then
    echo "the records would not be of a commit: commit or stash the changes first" >&2
    exit 2
fi

# rules FOLDER EPOCHS: the probes and rules of docs/aggregation.md on a quickstart's data
rules() {
    local out=$1 epochs=$2
    local data="--data_path $out/data --dataset demo --amp float32 --num_workers 0"
    local oracle="--oracle demo/mae_ft.safetensors --oracle_model vit_demo_patch8"
    rm -rf "$out/aggregation"
    python main_linprobe.py $data --model vit_demo_patch8 --finetune demo/mae.safetensors $oracle \
        --cls_features cls pos attn-mn attn-lcte ca1 dino abmilp ap1 --seeds 0 1 2 --seeds_vary weights --batch_size 100 --accum_iter 2 \
        --epochs "$epochs" --warmup_epochs 1 --blr 30 --eval_every "$epochs" --output_dir "$out/aggregation/probes/demo"
    python main_analyze_aggregation.py $data --probes "$out/aggregation/probes/demo" $oracle --batch_size 50 \
        --boxes "$out/data/boxes.csv" --loc_workers 0 --loc_map_heads best --output_dir "$out/aggregation/rules/demo"
}

short=output_dir/quickstart_short full=output_dir/quickstart
bash scripts/quickstart.sh --short
rules $short 2
if [ "$mode" = --short ]; then
    python scripts/make_tables.py --check --computed $short
    exit
fi
bash scripts/quickstart.sh
rules $full 12

python -m paper.shown $full $short
cp $full/attention/attention.png docs/quickstart_attention.png
cp $full/maps.png docs/quickstart_maps.png
cp $full/attention/park.png docs/attention_park.png
for name in boxes kl maps; do cp "$full/aggregation/rules/demo/$name.png" "docs/aggregation_$name.png"; done
sed -n 's/^<!-- .*: \(python scripts\/make_tables.py .*\) README.md -->$/\1 README.md/p' README.md | bash > /dev/null
sed -n 's/^<!-- .*: \(python scripts\/make_tables.py .*\) aggregation.md -->$/\1 docs\/aggregation.md/p' docs/aggregation.md | bash > /dev/null
python scripts/make_tables.py --check --computed $short
