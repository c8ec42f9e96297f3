#!/usr/bin/env bash
# Everything the project measures, for one encoder on real photos; the commands behind docs/real_encoder.md:
#   DATA=FOLDER LABEL=NAME SIZE=PIXELS TINY_SIZE=PIXELS OUT=FOLDER bash scripts/real_encoder.sh --model MODEL --finetune WEIGHTS [--family FAMILY]
# DATA holds imagenet_sample/ (val/<wnid>/*.JPEG) and tiny_imagenet/ (train/, val/, boxes.csv).
# SIZE and TINY_SIZE are the input sizes for the two data sets. A second call resumes where the first was stopped.
set -euo pipefail
source "$(dirname "$0")/env.sh"
: "${DATA:?folder of imagenet_sample and tiny_imagenet}" "${LABEL:?name of the encoder in figures}" "${OUT:?output folder}"
: "${SIZE:?input size for the photos}" "${TINY_SIZE:?input size for Tiny ImageNet}"
encoder=("$@")
weights=$(python - "$@" <<'PY'
import sys
print(sys.argv[sys.argv.index("--finetune") + 1])
PY
)
photos=$DATA/imagenet_sample tiny=$DATA/tiny_imagenet
common=(--amp float32 --resume auto)

echo "--- what is in the file"
python scripts/inspect_checkpoint.py "$weights" | tee "$OUT.inspect.txt"

echo "--- attention flow, all metrics: 1,000 ImageNet photos, then Tiny ImageNet's 4,000 test images"
python main_analyze_attention.py "${encoder[@]}" "${common[@]}" --label "$LABEL" --metrics all --batch_size 25 \
    --data_path "$photos" --input_size "$SIZE" --output_dir "$OUT/photos"
python main_analyze_attention.py "${encoder[@]}" "${common[@]}" --label "$LABEL" --metrics all --batch_size 100 \
    --data_path "$tiny" --input_size "$TINY_SIZE" --output_dir "$OUT/tiny"

echo "--- probes on four depths: rates chosen on held-out training images, three seeds, features computed once"
python main_linprobe.py "${encoder[@]}" "${common[@]}" --data_path "$tiny" --input_size "$TINY_SIZE" \
    --cls_features cls pos both abmilp abmilp:depth=2 ap1 ap12 ep8 --return_block ${BLOCKS:-2 5 8 11} --seeds 0 1 2 \
    --blr ${BLR:-3 10 30} --val_fraction 0.1 --crop center --no_hflip --cache_views 1 --batch_size 250 \
    --epochs ${EPOCHS:-10} --warmup_epochs 1 --knn 10 20 --save_predictions --save_every_minutes 5 --output_dir "$OUT/probes"
python scripts/compare_probes.py "$LABEL=$OUT/probes" --output "$OUT/comparison.md"

echo "--- what is aggregated, and whether it is the object"
python main_analyze_aggregation.py --probes "$OUT/probes" --probe_heads abmilp ap1 --boxes "$tiny/boxes.csv" \
    --data_path "$tiny" "${common[@]}" --output_dir "$OUT/aggregation"

echo "--- report"
python scripts/make_report.py "$OUT"/photos "$OUT"/tiny "$OUT"/probes "$OUT"/aggregation --output "$OUT/report.html"
