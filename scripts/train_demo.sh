#!/usr/bin/env bash
# Train the encoders of demo/ anew: bash scripts/train_demo.sh [FOLDER [--install]]
# About two hours on one CPU core; uses a GPU if there is one. The same command resumes a stopped run.
# The encoders end up in FOLDER (default output_dir/demo); --install copies them to demo/.
set -euo pipefail
source "$(dirname "$0")/env.sh"
out=${1:-output_dir/demo}
mkdir -p "$out"
common=(--model vit_demo_patch8 --data_path "$out/data" --batch_size 128 --num_workers 1 --seed 0 --resume auto)

python scripts/make_demo_data.py "$out/data" --train 8000 --val 2000 --seed 0
[ -f "$out/mae/encoder.safetensors" ] ||
    python main_pretrain.py "${common[@]}" --amp float32 --epochs 60 --warmup_epochs 4 --blr 2e-3 --output_dir "$out/mae"
# as the study's joint embedding (scripts/study_pretrain.sh), for as long as MAE
[ -f "$out/moco/encoder.safetensors" ] ||
    python main_pretrain.py "${common[@]}" --amp bfloat16 --epochs 60 --warmup_epochs 4 --blr 2e-3 --save_every_minutes 5 \
        --contrastive_weight 1 --temperature 0.1 --projector_width 512 --view_scale 0.3 --view_grey 0.8 --view_drop 0.5 \
        --output_dir "$out/moco"
# only crops and flips: RandAugment's rotations and mixing destroy the textures
[ -f "$out/mae_ft/encoder.safetensors" ] ||
    python main_finetune.py "${common[@]}" --finetune "$out/mae/encoder.safetensors" --output_dir "$out/mae_ft" \
        --amp float32 --epochs 15 --warmup_epochs 2 --blr 2e-3 --layer_decay 0.75 --drop_path 0 --crop_scale 0.35 \
        --aa "" --reprob 0 --mixup 0 --cutmix 0

if [ "${2:-}" = --install ]; then
    for name in mae moco mae_ft; do
        cp "$out/$name/encoder.safetensors" "demo/$name.safetensors"
        cp "$out/$name/args.json" "demo/$name.args.json"
        cp "$out/$name/log.txt" "demo/$name.log.txt"
    done
    cp "$out/mae/reconstruction.png" demo/reconstruction.png
fi
