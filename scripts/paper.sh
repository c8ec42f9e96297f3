# Sourced by the scripts of single tables and figures: source "$(dirname "$0")/paper.sh" "$@"
#   (nothing)        ImageNet-1k on this machine, on all of its GPUs
#   --slurm FLAG...  the same through submitit_linprobe.py, whose flags follow: --slurm --partition gpu --account me
#   --smoke          the same chain on the embedded demo, in a minute or two: it shows that everything runs
# Reads IMAGENET (folder with train/ and val/), BOXES (default: $IMAGENET/LOC_val_solution.csv) and OUT (default:
# output_dir/paper, with --smoke output_dir/smoke). Runs that are there already are not repeated: remove what is to be
# made anew. The protocol is the paper's (B.2): LARS, base rate 0.1, effective batch 16,384, 90 epochs, three seeds.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
usage() {
    echo "usage: bash scripts/$(basename "$0") [--smoke | --slurm FLAG...]" >&2
    sed -n '/^#   /s/^# //p' scripts/paper.sh >&2
    exit 2
}

mode=${1:-local}
case "$mode" in
    local) ;;
    --slurm) shift ;;
    --smoke) [ $# = 1 ] || usage ;;
    *) usage ;;
esac
if [ "$mode" = --smoke ]; then
    out=${OUT:-output_dir/smoke}
    BOXES=$out/data/boxes.csv
    python scripts/make_demo_data.py "$out/data" --train 400 --val 100
    data=(--data_path "$out/data" --amp float32 --num_workers 0)
    recipe=(--batch_size 100 --accum_iter 2 --epochs 2 --warmup_epochs 0 --blr 30 --seeds 0 1)
    oracle=(--oracle demo/mae_ft.safetensors --oracle_model vit_demo_patch8)
else
    : "${IMAGENET:?name the folder of ImageNet-1k in IMAGENET, or try --smoke}"
    out=${OUT:-output_dir/paper} BOXES=${BOXES:-$IMAGENET/LOC_val_solution.csv}
    data=(--dataset imagenet1k --data_path "$IMAGENET" --num_workers 16)
    gpus=4
    [ "$mode" = --slurm ] || gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
    [ $((8 % gpus)) = 0 ] || { echo "an effective batch of 8 x 2,048 is not divided by $gpus GPUs: show 1, 2, 4 or 8 of them with CUDA_VISIBLE_DEVICES" >&2; exit 2; }
    recipe=(--batch_size 2048 --accum_iter $((8 / gpus)) --seeds 0 1 2)
    oracle=(--oracle dino_vit_base_patch16)
fi

# weights MODEL: --model and --finetune of the encoder that the paper calls so
weights() {
    if [ "$mode" = --smoke ]; then
        case "$1" in mae) echo "--model vit_demo_patch8 --finetune demo/mae.safetensors" ;;
            *) echo "--model vit_demo_patch8 --finetune demo/mae_ft.safetensors" ;; esac
    else
        echo "--model vit_base_patch16 --finetune $1_vit_base_patch16"
    fi
}

# program FOLDER MAIN FLAG...: MAIN with its run folder, on this machine or as a job
program() {
    local folder=$1 main=$2
    shift 2
    if [ "$mode" = --slurm ]; then
        python submitit_linprobe.py --main "$main" --job_dir "$folder" --wait --ngpus "$gpus" "${slurm[@]}" "$@"
    elif [ "$mode" = --smoke ] || [ "$gpus" = 1 ]; then
        python "$main.py" --output_dir "$folder" "$@"
    else
        torchrun --standalone --nproc_per_node "$gpus" "$main.py" --output_dir "$folder" "$@"
    fi
}
slurm=("$@")

# probe MODEL: the probes of an encoder, where they have not been trained yet. MAE's are those of Table 6.
probe() {
    local heads=(abmilp) resume=(--resume auto)
    [ "$1" != mae ] || heads=(attn-mn attn-lcte ca1 dino abmilp "${oracle[@]}")
    [ "$mode" != --slurm ] || resume=()  # the launcher's business
    [ -f "$out/probes/$1/results.json" ] ||
        program "$out/probes/$1" main_linprobe $(weights "$1") "${data[@]}" "${recipe[@]}" "${resume[@]}" \
            --cls_features "${heads[@]}"
}

# aggregate MODEL: entropies, divergences and maps of the rules of Table 6. localise MODEL: boxes of [cls] and AbMILP.
aggregate() {
    probe "$1"
    [ -f "$out/aggregation/$1/aggregation.json" ] ||
        program "$out/aggregation/$1" main_analyze_aggregation "${data[@]}" "${oracle[@]}" --probes "$out/probes/$1"
}
localise() {
    probe "$1"
    [ -f "$out/localization/$1/aggregation.json" ] ||
        program "$out/localization/$1" main_analyze_aggregation "${data[@]}" --probes "$out/probes/$1" \
            --rules attn-mn --boxes "$BOXES" --boxes_only
}

# publish FILE NAME: the file under the name that the paper has for it
publish() {
    mkdir -p "$out/figures"
    cp "$1" "$out/figures/$2"
    echo "$out/figures/$2"
}
