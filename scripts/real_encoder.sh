#!/usr/bin/env bash
# The commands behind docs/real_encoder.md, for any encoder:
#   DATA=FOLDER OUT=FOLDER LABEL=NAME SIZE=PIXELS TINY_SIZE=PIXELS bash scripts/real_encoder.sh --model MODEL --finetune WEIGHTS [...]
# DATA holds imagenet_sample/val/<wnid>/*.JPEG and tiny_imagenet/{train,val}/<wnid>/*.JPEG with boxes.csv. SIZE and
# TINY_SIZE are the input sizes for the two. BLOCKS (default: 2 5 8 11) are the blocks that are probed, BLR (default:
# 3 10 30) the rates to choose from. A second call resumes.
set -euo pipefail
source "$(dirname "$0")/env.sh"
: "${DATA:?folder of imagenet_sample and tiny_imagenet}" "${OUT:?output folder}" "${LABEL:?name in figures}"
: "${SIZE:?input size for the photos}" "${TINY_SIZE:?input size for Tiny ImageNet}"
photos=$DATA/imagenet_sample tiny=$DATA/tiny_imagenet
common=(--amp float32 --resume auto --save_every_minutes 5)

echo "--- attention flow: all metrics"
python main_analyze_attention.py "$@" "${common[@]}" --label "$LABEL" --metrics all --batch_size 20 --data_path "$photos" \
    --input_size "$SIZE" --output_dir "$OUT/photos"
python main_analyze_attention.py "$@" "${common[@]}" --label "$LABEL" --metrics all --batch_size 50 --data_path "$tiny" \
    --input_size "$TINY_SIZE" --output_dir "$OUT/tiny"

echo "--- probes: rates chosen on held-out images, three seeds, features computed once"
read -ra blocks <<< "${BLOCKS:-2 5 8 11}"
read -ra rates <<< "${BLR:-3 10 30}"
python main_linprobe.py "$@" "${common[@]}" --data_path "$tiny" --input_size "$TINY_SIZE" \
    --cls_features cls pos both abmilp abmilp:depth=2 ap1 ap12 ep8 --return_block "${blocks[@]}" --seeds 0 1 2 \
    --blr "${rates[@]}" --val_fraction 0.1 --crop center --no_hflip --cache_views 1 --batch_size 250 --epochs 6 \
    --warmup_epochs 1 --eval_every 6 --knn 10 20 --save_predictions --output_dir "$OUT/probes"
python scripts/compare_probes.py "$LABEL=$OUT/probes" --output "$OUT/comparison.md"

echo "--- what is aggregated, and whether it is the object"
python main_analyze_aggregation.py --probes "$OUT/probes" --probe_heads abmilp --boxes "$tiny/boxes.csv" --num_images 500 \
    --loc_step 0.01 --data_path "$tiny" --batch_size 50 "${common[@]}" --output_dir "$OUT/aggregation"

python scripts/make_report.py "$OUT/photos" "$OUT/tiny" "$OUT/probes" "$OUT/aggregation" --output "$OUT/report.html"
