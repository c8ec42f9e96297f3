#!/usr/bin/env bash
# A row of the leaderboard from nothing:
#   bash scripts/evaluate.sh WEIGHTS [--dataset NAME --data_path FOLDER] [other flags of main_linprobe.py]
# WEIGHTS is any --finetune: hf:ORG/NAME, a timm model, a catalogue name, a URL, a file. Without --dataset the images are
# those of the demo, which are made here; they show that everything runs and say nothing about photos. Heads: [cls] (or
# the mean patch alone, with HEADS=pos), mean patch, AbMILP; three seeds; rates chosen on a tenth of the training images.
# The records go to results/leaderboard, or to RESULTS; scripts/leaderboard.py shows them. A second call resumes.
set -euo pipefail
case "${1:---help}" in -h | --help) sed -n '2,/^set /{/^#/s/^# \?//p}' "$0"; exit ;; esac
source "$(dirname "$0")/env.sh"
weights=$1
shift
name=$(basename "${weights%.*}" | tr -c 'A-Za-z0-9._\n-' _)
out=output_dir/evaluate/$name results=${RESULTS:-results/leaderboard}
read -ra heads <<< "${HEADS:-cls pos abmilp}"
data=()
if [[ " $* " != *" --dataset"* ]]; then
    data=(--dataset demo --data_path output_dir/evaluate/data)
    [ -d output_dir/evaluate/data ] || python scripts/make_demo_data.py output_dir/evaluate/data --train 2000 --val 1000
fi
python main_linprobe.py --finetune "$weights" --cls_features "${heads[@]}" --seeds 0 1 2 --blr 3 10 30 --val_fraction 0.1 \
    --crop center --no_hflip --cache_views 1 --batch_size 250 --epochs 10 --warmup_epochs 1 --eval_every 10 --knn 10 20 \
    --save_predictions --resume auto "${data[@]}" "$@" --output_dir "$out"
mkdir -p "$results"
cp --remove-destination "$out/results.json" "$results/$name.results.json"
python scripts/compare_probes.py "$out" --output "$results/$name.comparison.json"
python scripts/leaderboard.py "$results" --output output_dir/evaluate/leaderboard.html
echo "records: $results/$name.results.json, $results/$name.comparison.json"
echo "page:    output_dir/evaluate/leaderboard.html"
