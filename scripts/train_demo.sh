#!/usr/bin/env bash
# Make the demo encoders of demo/ again: bash scripts/train_demo.sh [FOLDER]
# About an hour on 2 CPU cores. Continues where it was stopped. A GPU is used where there is one.
set -euo pipefail
source "$(dirname "$0")/env.sh"
out=${1:-output_dir/demo}
mkdir -p "$out"
common="--model vit_demo_patch8 --data_path $out/data --batch_size 128 --amp float32 --num_workers 1 --seed 0 --resume auto"

python scripts/make_demo_data.py "$out/data" --train 8000 --val 2000 --seed 0
python main_pretrain.py $common --epochs 60 --warmup_epochs 4 --blr 2e-3 --output_dir "$out/mae"
