# Sourced by the scripts of single tables and figures: source "$(dirname "$0")/paper.sh" "$@"
#   (nothing)        ImageNet-1k on this machine, on all of its GPUs
#   --slurm FLAG...  the same through submitit_linprobe.py, whose flags follow: --slurm --partition gpu --account me
#   --smoke          the same steps on the embedded demo, in minutes on a CPU: a test that everything runs
# Finished runs are skipped: remove a run's folder to repeat it. Settings, from the environment:
#   IMAGENET            folder with train/ and val/
#   BOXES               boxes of its validation images (default: LOC_val_solution.csv in it)
#   OUT                 runs and figures (default: output_dir/paper, with --smoke output_dir/smoke)
#   RESULTS             records and tables (default: results, with --smoke $OUT/results)
#   OWN                 folder of mae_small/ and mae_ft_{small,base,large}/, which are unpublished (default: runs)
#   GPUS                1, 2, 4 or 8 (default: this machine's, with --slurm 4)
#   BATCH               images per GPU and micro-step (default: 2048); a divisor of it where memory is short
#   DEEP=apart          Table 5's deep heads in three separate runs, where one bank does not fit in memory
#   IMAGES_PER_SECOND   speed of the encoder on one GPU (scripts/benchmark_gpu.sh measures it), for estimates of time
#   TRAIN, VAL, EPOCHS  with --smoke: images and epochs (default: 1000, 500, 6)
#   PRINT=1             print every command, with the paths of its runs, and run nothing
# Protocol (paper, B.2): LARS, base rate 0.1, effective batch 16,384 normalised in groups of 2,048, 90 epochs (50 for
# ViT-L and ViT-H), three seeds; tokens before the last norm, for CAPI after it, as its public model returns them
# (--final_norm). One pass trains the heads of all tables.
set -euo pipefail
usage() {
    echo "usage: bash scripts/$(basename "$0") [--smoke | --slurm FLAG...]" >&2
    sed -n '/^#   /s/^# //p' "$(dirname "${BASH_SOURCE[0]}")/paper.sh" >&2
    exit 2
}

mode=${1:-local}
case "$mode" in
    local) ;;
    --slurm) shift ;;
    --smoke) [ $# = 1 ] || usage ;;
    *) usage ;;
esac
if [ "$mode" != --smoke ] && [ -z "${IMAGENET:-}" ]; then
    echo "name the folder of ImageNet-1k in IMAGENET, or try --smoke" >&2
    exit 2
fi
if [ "$mode" != --smoke ] && [ -z "${PRINT:-}" ] && [ ! -d "$IMAGENET" ]; then
    echo "IMAGENET=$IMAGENET: there is no such folder" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
slurm=("$@") skipped=() failed=()
own=${OWN:-runs}
# an interrupted program saves and ends by itself, and bash would continue with the next one
trap 'echo "interrupted: the same command goes on from here" >&2; exit 130' INT

# show COMMAND...: run it; with PRINT=1, print it
show() {
    if [ -n "${PRINT:-}" ]; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}

if [ "$mode" = --smoke ]; then
    out=${OUT:-output_dir/smoke} gpus=1 table_of=demo
    results=${RESULTS:-$out/results} BOXES=$out/data/boxes.csv
    [ -f "$out/data/demo.json" ] ||
        show python scripts/make_demo_data.py "$out/data" --train "${TRAIN:-1000}" --val "${VAL:-500}"
    data=(--dataset demo --data_path "$out/data" --amp float32 --num_workers 0)
    oracle=(--oracle demo/mae_ft.safetensors --oracle_model vit_demo_patch8)
else
    out=${OUT:-output_dir/paper} results=${RESULTS:-results} BOXES=${BOXES:-$IMAGENET/LOC_val_solution.csv}
    table_of=imagenet1k gpus=${GPUS:-}
    data=(--dataset imagenet1k --data_path "$IMAGENET" --num_workers 16)
    oracle=(--oracle dino_vit_base_patch16)
    if [ -z "$gpus" ]; then
        gpus=4
        [ "$mode" = --slurm ] || gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
    batch=${BATCH:-2048}
    case "$gpus" in 1 | 2 | 4 | 8) ;; *)
        echo "$gpus GPUs do not share the 8 groups of 2,048 of a batch evenly: set GPUS=1, 2, 4 or 8" >&2
        exit 2 ;;
    esac
    if ! [[ "$batch" =~ ^[1-9][0-9]{0,3}$ ]] || [ $((2048 % batch)) != 0 ]; then
        echo "BATCH=$batch: 2,048 images are normalised together: give a divisor of 2048" >&2
        exit 2
    fi
fi

# encoders NAME...: the given ones, by catalogue name; with --smoke the demo's
encoders() {
    if [ "$mode" = --smoke ]; then
        echo mae_vit_demo_patch8 mae_ft_vit_demo_patch8
    else
        echo "$@"
    fi
}

# weights NAME: sets `encoder` to the --model and --finetune of one; fails if it must be trained first
weights() {
    local file=$1 size
    case "$1" in
        mae_vit_demo_*) file=demo/mae.safetensors ;;
        mae_ft_vit_demo_*) file=demo/mae_ft.safetensors ;;
        mae_vit_small_*) file=$own/mae_small/encoder.safetensors ;;
        mae_ft_vit_*) size=${1#mae_ft_vit_} file=$own/mae_ft_${size%%_*}/encoder.safetensors ;;
    esac
    if [[ "$file" = "$own"/* && ! -f "$file" ]]; then
        [ -n "${PRINT:-}" ] || return 1
        echo "# $file does not exist: make it with scripts/pretrain_mae_small.sh or finetune_mae_cls.sh" >&2
    fi
    encoder=(--model "vit${1#*_vit}" --finetune "$file")
}

# With PRINT=1, empty files here represent the results that $out would hold, also for scripts that this one calls.
if [ -n "${PRINT:-}" ] && [ -z "${PLANNED:-}" ]; then
    PLANNED=$(mktemp -d)
    export PLANNED
    trap 'rm -rf "$PLANNED"' EXIT
fi

# there PATTERN...: files in $out, or with PRINT=1 those that would be
there() {
    local pattern root path
    for pattern in "$@"; do
        for root in "$out" ${PLANNED:+"$PLANNED"}; do
            for path in "$root"/$pattern; do
                [ ! -e "$path" ] || echo "$out/${path#"$root"/}"
            done
        done
    done
}

# hours NAME IMAGES: what a run will take; loading images, and heads that transform every token, come on top
hours() {
    awk -v name="$1" -v images="$2" -v rate="${IMAGES_PER_SECOND:-0}" -v gpus="$gpus" 'BEGIN {
        hours = rate + 0 > 0 ? images / rate / 3600 : 0
        printf "# %s: %d images through the encoder", name, images
        if (hours) printf ": %.1f GPU-hours, %.1f h on %d GPU%s\n", hours, hours / gpus, gpus, (gpus > 1 ? "s" : "")
        else print "; hours are unknown without IMAGES_PER_SECOND" }'
}

# program FOLDER RESULT IMAGES MAIN FLAG...: unless FOLDER/RESULT exists, run MAIN with this run folder, here or as a job.
# IMAGES: number of images through the encoder, for the estimate of time.
program() {
    local folder=$1 images=$3 main=$4 place=${1#"$out"/}/$2
    shift 4
    [ -z "$(there "$place")" ] || return 0
    [ -z "${PLANNED:-}" ] || { mkdir -p "$PLANNED/${place%/*}" && touch "$PLANNED/$place"; }
    local command=(python "$main.py" --output_dir "$folder") resume=(--resume auto)
    if [ "$mode" = --slurm ]; then
        command=(python submitit_linprobe.py --main "$main" --job_dir "$folder" --wait --ngpus "$gpus" "${slurm[@]}")
        resume=()  # the launcher resumes
    elif [ "$gpus" != 1 ]; then
        command=(torchrun --standalone --nproc_per_node "$gpus" "$main.py" --output_dir "$folder")
    fi
    [ "$mode" = --smoke ] || hours "$folder" "$images"
    show "${command[@]}" "${resume[@]}" "$@"
}

# each FUNCTION NAME...: for every encoder (through SLURM, all in parallel); a failure does not stop the others
each() {
    local what=$1 name number=0 jobs=()
    shift
    for name in "$@"; do
        if ! weights "${name%%/*}" > /dev/null 2>&1; then
            skipped+=("${name%%/*}")
        elif [ "$mode" = --slurm ] && [ -z "${PRINT:-}" ]; then
            "$what" "$name" &
            jobs+=($!) names+=("$name")
        else
            "$what" "$name" || failed+=("$what $name")
        fi
    done
    for number in "${!jobs[@]}"; do
        wait "${jobs[number]}" || failed+=("$what ${names[number]}")
    done
    names=()
}
names=()

deep=(abmilp:depth={2,3,4}{,\,act=gelu,\,act=tanh})

# epochs NAME; tokens NAME: before or after the last norm; heads NAME: the heads of all tables
tokens() { case "$1" in capi_*) echo --final_norm ;; esac }
epochs() { case "$1" in *_large_* | *_huge_*) echo 50 ;; *) echo 90 ;; esac; }
heads() {
    case "$1" in ijepa_* | capi_*) echo pos abmilp ;; *) echo cls pos abmilp ;; esac
    case "$1" in mae_* | beitv2_* | ijepa_* | capi_*) echo ap1 ap12 ;; esac  # Table 7
    case "$1" in mae_vit_base_* | mae_vit_demo_*)
        echo attn-mn attn-lcte ca1 dino  # Table 6
        [ -n "${DEEP:-}" ] || echo "${deep[@]}" ;;  # Table 5
    esac
}

# bank FOLDER NAME FLAG...: probes of an encoder at the protocol
bank() {
    local folder=$1 name=$2 recipe n images
    n=$(epochs "$name")
    images=$((n * (3 * 1281167 + 50000)))  # three seeds train on views of their own
    [[ " $* " != *" dino "* ]] || images=$((2 * images))  # the oracle sees them, too
    shift 2
    if [ "$mode" = --smoke ]; then
        recipe=(--batch_size 50 --accum_iter 2 --bn_group 50 --epochs "${EPOCHS:-6}" --warmup_epochs 1 --blr 30
            --eval_every "${EPOCHS:-6}")
    else
        recipe=(--batch_size "$batch" --accum_iter $((16384 / gpus / batch)) --bn_group 2048 --epochs "$n"
            --warmup_epochs 10 --blr 0.1)
    fi
    weights "$name"
    program "$folder" results.json "$images" main_linprobe "${encoder[@]}" "${data[@]}" \
        "${recipe[@]}" --seeds 0 1 2 $(tokens "$name") "$@"
}

# probe NAME: the bank of an encoder, used by Tables 1, 5, 6, 7, 8 and Figures 1, 7, 8, 9
probe() {
    bank "$out/probes/$1" "$1" "${oracle[@]}" --cls_features $(heads "$1")
}

# deepen NAME: the rest of Table 5: deep heads if they are separate, and self-attention, which LARS does not train
deepen() {
    local act rate=0.1 apart=${DEEP:-} made="$out/probes/$1/results.json"
    [ "$mode" != --smoke ] || rate=1
    if [ -f "$made" ]; then  # whatever DEEP is now, the finished bank has them or not
        apart=yes
        ! grep -q abmilp:depth=4 "$made" || apart=
    fi
    if [ -n "$apart" ]; then
        for act in relu gelu tanh; do
            bank "$out/deep/$1-$act" "$1" --cls_features abmilp:depth={2,3,4},act=$act || return 1
        done
    fi
    bank "$out/deep/$1-sa" "$1" --optimizer sgd --blr "$rate" --cls_features abmilp:sa=both
}

# transfer NAME/DATASET: baseline and AbMILP (Table 2)
declare -A images_of=([imagenet1pct]=88433 [food101]=252500 [coco]=359861 [nus_wide]=593226 [cub200]=23776
    [stanford_cars]=32473 [oxford_pets]=14709)  # per epoch: test images, and three seeds' training images
transfer() {
    local name=${1%%/*} set=${1#*/} heads=(cls abmilp) n gpus=$gpus recipe flags images folder
    case "$name" in ijepa_* | capi_*) heads=(pos abmilp) ;; esac
    n=$(epochs "$name")
    images=${images_of[$set]:-0} folder=${set^^}
    [ "$set" != imagenet1pct ] || folder=IMAGENET
    flags=(--dataset "$set" --data_path "${!folder:-}" --num_workers 16)
    [ "$set" != demo_few ] || flags=(--dataset demo_few "${data[@]:2}")
    case "$set" in
        demo_few) recipe=(--optimizer sgd --blr 1 --batch_size 20 --bn_group 20 --epochs "${EPOCHS:-6}"
            --warmup_epochs 1) ;;
        food101 | coco | nus_wide) recipe=(--blr 0.1 --batch_size "$batch" --accum_iter $((16384 / gpus / batch))
            --bn_group 2048 --epochs "$n" --warmup_epochs 10) ;;
        *)  # P-SGD: one group of 1,024, on one GPU
            gpus=1
            [ "$batch" -le 1024 ] || local batch=1024
            recipe=(--optimizer sgd --blr 0.1 --batch_size "$batch" --accum_iter $((1024 / batch)) --bn_group 1024
                --epochs "$n" --warmup_epochs 10) ;;
    esac
    weights "$name"
    program "$out/transfer/$name/$set" results.json $((n * images)) main_linprobe "${encoder[@]}" "${flags[@]}" \
        "${recipe[@]}" --seeds 0 1 2 $(tokens "$name") --cls_features "${heads[@]}"
}

# attend NAME: attention flow over the validation images (Table 3, Figures 3 to 6 and 10 to 13)
attend() {
    local label
    case "$1" in
        mae_ft_*) label=MAE-FT ;;
        mae_*) label=MAE ;;
        dino_*) label=DINO ;;
        mocov3_*) label=MoCo-v3 ;;
        ibot_*) label=iBOT ;;
        *) label=${1%%_*} ;;
    esac
    weights "$1"
    program "$out/attention/$1" "$label/attention.json" 50000 main_analyze_attention "${encoder[@]}" "${data[@]}" \
        --metrics flow --label "$label"
}

# deep_probes NAME: heads on every block; attend_all NAME: every metric on 5,000 images (figure_depth.sh)
# NAME/decoder: through MAE's decoder; pretrain_decoder makes one for --smoke
deep_probes() {
    local last=11 name=${1%/decoder}
    case "$1" in *_demo_*/decoder) last=7 ;; *_demo_*) last=5 ;; */decoder) last=19 ;; esac
    decoder "$1"
    bank "$out/depth/${1/\//-}" "$name" "${decoder[@]}" --cls_features cls pos abmilp --return_block $(seq 0 $last)
}
attend_all() {
    weights "${1%/decoder}"
    decoder "$1"
    program "$out/metrics/${1/\//-}" "${1/\//-}/attention.json" 5000 main_analyze_attention "${encoder[@]}" \
        "${decoder[@]}" "${data[@]}" --metrics all --label "${1/\//-}" \
        --num_images "$([ "$mode" = --smoke ] && echo "${VAL:-500}" || echo 5000)"
}
decoder() {  # sets `decoder` to its flags
    case "$1" in
        *_demo_*/decoder) decoder=(--decoder --finetune "$out/mae_decoder/encoder.safetensors") ;;
        */decoder) decoder=(--decoder) ;;
        *) decoder=() ;;
    esac
}
pretrain_decoder() {
    [ "$mode" != --smoke ] || program "$out/mae_decoder" results.json 0 main_pretrain --model vit_demo_patch8 \
        --keep_decoder --epochs "${EPOCHS:-6}" --warmup_epochs 1 --blr 2e-3 "${data[@]}"
}

# depth NAME...: accuracy and attention by block, with the table of the first block that reaches 90 % of the best
depth() {
    local name pairs=()
    for name in "${@//\//-}"; do
        [ -z "$(there "depth/$name/results.json")" ] ||
            pairs+=("$name=$out/depth/$name/results.json,$out/metrics/$name/$name/attention.json")
    done
    [ ${#pairs[@]} != 0 ] || return 0
    show mkdir -p "$out/figures"
    show python scripts/plot_depth.py "${pairs[@]}" --output "$out/figures/depth.pdf" || failed+=("depth.pdf")
}

# aggregate NAME: entropies, divergences and maps of the rules of Table 6. localise NAME: boxes of [cls] and AbMILP.
aggregate() {
    program "$out/aggregation/$1" aggregation.json 100000 main_analyze_aggregation "${data[@]}" "${oracle[@]}" \
        --probes "$out/probes/$1" --probe_heads abmilp --rules attn-mn attn-lcte ca1 dino
}
localise() {
    program "$out/localization/$1" aggregation.json 50000 main_analyze_aggregation "${data[@]}" \
        --probes "$out/probes/$1" --probe_heads abmilp --rules attn-mn --boxes "$BOXES" --boxes_only
}

# tables NUMBER...: record all runs and make these tables. LATER=1: left to the calling script.
tables() {
    [ -z "${LATER:-}" ] || return 0
    local runs
    mapfile -t runs < <(there {probes,deep}/'*/results.json' 'attention/*/*/attention.json' \
        {aggregation,localization}/'*/aggregation.json' 'transfer/*/*/results.json')
    runs=("${runs[@]%/*}")
    if [ ${#runs[@]} = 0 ]; then
        failed+=("tables $*: no finished runs")
        return 0
    fi
    show python scripts/record.py "${runs[@]}" --results "$results" --replace || failed+=("records: tables show older ones")
    show python scripts/make_tables.py --table "$@" --dataset "$table_of" --results "$results" || failed+=("tables $*")
}

# publish FILE NAME: copy a figure of a run, named as in the paper
publish() {
    if [ -n "${PRINT:-}" ] || [ -f "$1" ]; then
        show mkdir -p "$out/figures"
        show cp --remove-destination "$1" "$out/figures/$2" || { failed+=("$2"); return 0; }
        [ -n "${PRINT:-}" ] || echo "$out/figures/$2"
    fi
}

# lines FILE NAME...: attention flow of encoders, block by block
lines() {
    local file=$1 found patterns
    shift
    patterns=("${@/#/attention/}")
    mapfile -t found < <(there "${patterns[@]/%//*/attention.json}")
    [ ${#found[@]} != 0 ] || return 0
    show mkdir -p "$out/figures"
    show python scripts/plot_attention.py "${found[@]}" --kind attention --output "$out/figures/$file" || failed+=("$file")
}

# bars: Figure 1 from the records
bars() {
    [ -z "${LATER:-}" ] || return 0
    show mkdir -p "$out/figures"
    show python scripts/plot_bars.py --dataset "$table_of" --results "$results" --output "$out/figures/figure1.pdf" ||
        failed+=("figure1.pdf")
}

# report: one page on all runs
report() {
    local runs
    mapfile -t runs < <(there {probes,deep,attention,aggregation,localization}/'*' 'transfer/*/*')
    [ ${#runs[@]} = 0 ] || show python scripts/make_report.py "${runs[@]}" --output "$out/report.html" ||
        failed+=("report.html")
}

# finish: list what was left out, and why; exit code 1 if a run failed
finish() {
    local name
    for name in $(printf '%s\n' "${skipped[@]}" | sort -u); do
        echo "left out: $name, which is unpublished: make it with scripts/pretrain_mae_small.sh and" \
            "scripts/finetune_mae_cls.sh, in $own" >&2
    done
    [ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
}
