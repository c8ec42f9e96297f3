#!/usr/bin/env bash
# One GPU in eight minutes: checks what fast code computes, then times analysis, banks, steps, pretraining and loaders.
# usage: bash scripts/benchmark_gpu.sh [--device cpu --tiny] [other flags of benchmark.py]
#   DATA_PATH   images for the loaders: an image folder, or a folder of scripts/pack_images.py (default: no loaders)
#   OUT         folder of the rows and the chart (default: output_dir/benchmark)
set -euo pipefail
case "${1:-}" in --help | -h) sed -n '2,5s/^# //p' "$0"; exit ;; esac
source "$(dirname "$0")/env.sh"
out=${OUT:-output_dir/benchmark}
rows="$out/benchmark.csv" images=()
[ -z "${DATA_PATH:-}" ] || images=(loader --data_path "$DATA_PATH")
if [[ " $* " == *" --tiny "* ]]; then
    exec python scripts/benchmark.py values analysis step accumulate heads paper evaluate pretrain "${images[@]}" "$@"
fi

# limited SECONDS GROUP [FLAGS]: a group that takes longer is left out
limited() {
    timeout "$1" python scripts/benchmark.py "${@:2}" --output "$rows" "${flags[@]}" || echo "left out: $2" >&2
}
flags=("$@")
python scripts/benchmark.py values "$@"
limited 80 analysis --batch_size 64
limited 120 step heads --batch_size 256 --probes 64 512
limited 60 step --batch_size 256 --probes 16 --classes 21841
limited 40 accumulate --batch_size 256 --probes 64
limited 50 paper --batch_size 64 --head_amp
limited 50 pretrain --batch_size 64
[ ${#images[@]} = 0 ] || limited 60 "${images[@]}" --batch_size 128
python scripts/benchmark.py plot --output "$rows" --figure "$out/benchmark.png"
