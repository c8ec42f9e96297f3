# Sourced by the training scripts: launch PROGRAM EFFECTIVE_BATCH BATCH FLAGS... runs one of the main_*.py on this machine
# or sends it to SLURM, with as many micro-steps as make up the effective batch. Settings, from the environment:
#   DATA, OUT    the data set (train/<class>/*, val/<class>/*) and the run folder; both needed
#   GPUS         processes per node, one GPU each (default: this machine's GPUs; with SLURM 8); 0: one process on the CPU
#   NODES        of SLURM (default 1)
#   BATCH        images per GPU and micro-step, where the script's do not fit in memory
#   SLURM        the launcher's flags, e.g. "--partition gpu --account a1": send it instead of running it here
#   PRINT=1      show the command and stop
launch() {
    local program=$1 effective=$2 batch=${BATCH:-$3} nodes=${NODES:-1} gpus=${GPUS:-} command
    shift 3
    [ -n "${DATA:-}" ] && [ -n "${OUT:-}" ] || { echo "say DATA=folder of the images and OUT=folder of the run" >&2; exit 2; }
    if [ -z "$gpus" ]; then
        gpus=8
        [ -n "${SLURM+set}" ] || gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    fi
    local processes=$((nodes * (gpus > 0 ? gpus : 1))) share
    share=$((effective / processes))
    [ -n "${BATCH:-}" ] || while [ $((share % batch)) != 0 ]; do batch=$((batch - 1)); done
    if [ $((share * processes)) != "$effective" ] || [ $((share % batch)) != 0 ]; then
        echo "$processes processes x BATCH=$batch do not divide an effective batch of $effective: choose others" >&2
        exit 2
    fi
    local flags=(--data_path "$DATA" --batch_size "$batch" --accum_iter $((share / batch)) "$@")
    if [ -n "${SLURM+set}" ]; then
        command=(python submitit_linprobe.py --main "$program" --job_dir "$OUT" --nodes "$nodes" --ngpus "$gpus" $SLURM)
    else
        [ "$nodes" = 1 ] || { echo "NODES=$nodes takes SLURM" >&2; exit 2; }
        flags+=(--output_dir "$OUT" --resume auto)
        command=(python "$program.py")
        [ "$gpus" -lt 2 ] || command=(torchrun --standalone --nproc_per_node "$gpus" "$program.py")
        if [ "$gpus" = 0 ]; then
            flags+=(--device cpu)
            [ -n "${GPUS:-}" ] || echo "# no GPU here, so this is for the CPU: weeks; GPUS=8 shows the command of a GPU node" >&2
        fi
    fi
    command+=("${flags[@]}")
    if [ -n "${PRINT:-}" ]; then
        printf '%q ' "${command[@]}"; echo
    else
        "${command[@]}"
    fi
}
