# Sourced by the training scripts: launch PROGRAM EFFECTIVE_BATCH BATCH FLAGS... runs a main_*.py on this machine or
# submits it to SLURM, with as many micro-steps as the effective batch needs. Settings, from the environment:
#   DATA, OUT    data set (train/<class>/*, val/<class>/*) and run folder; both required
#   GPUS         processes per node, one GPU each (default: this machine's GPUs; with SLURM 8); 0: one process on the CPU
#   NODES        SLURM nodes (default 1)
#   BATCH        images per GPU and micro-step, if the script's default does not fit in memory
#   SLURM        flags of submitit_linprobe.py, e.g. "--partition gpu --account a1": submit instead of running here
#   PRINT=1      print the command and stop
fail() { echo "$1" >&2; exit 2; }

launch() {
    local program=$1 effective=$2 batch=${BATCH:-$3} nodes=${NODES:-1} gpus=${GPUS:-} name
    shift 3
    [ -n "${DATA:-}" ] && [ -n "${OUT:-}" ] || fail "set DATA=folder of the images and OUT=folder of the run"
    if [ -z "$gpus" ]; then
        gpus=8
        [ -n "${SLURM+set}" ] || gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    fi
    for name in nodes gpus batch; do  # bash arithmetic would execute what is not a number
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "${name^^} must be an integer, got ${!name}"
    done
    [ "$nodes" -gt 0 ] && [ "$batch" -gt 0 ] || fail "NODES and BATCH must be >= 1, got $nodes and $batch"
    local processes=$((nodes * (gpus > 0 ? gpus : 1))) share
    share=$((effective / processes))
    [ -n "${BATCH:-}" ] || while [ $((share % batch)) != 0 ]; do batch=$((batch - 1)); done
    if [ $((share * processes)) != "$effective" ] || [ $((share % batch)) != 0 ]; then
        fail "$processes processes x BATCH=$batch do not divide the effective batch of $effective: change GPUS, NODES or BATCH"
    fi
    local flags=(--data_path "$DATA" --batch_size "$batch" --accum_iter $((share / batch)) "$@") command=(python "$program.py")
    if [ -n "${SLURM+set}" ]; then
        local slurm=()
        read -rd "" -a slurm <<< "$SLURM" || true  # of all lines
        command=(python submitit_linprobe.py --main "$program" --job_dir "$OUT" --nodes "$nodes" --ngpus "$gpus" "${slurm[@]}")
    else
        [ "$nodes" = 1 ] || fail "NODES=$nodes needs SLURM"
        flags+=(--output_dir "$OUT" --resume auto)
        [ "$gpus" -lt 2 ] || command=(torchrun --standalone --nproc_per_node "$gpus" "$program.py")
        if [ "$gpus" = 0 ]; then
            flags+=(--device cpu)
            [ -n "${GPUS:-}" ] || echo "# no GPU found: on the CPU this takes weeks; GPUS=8 prints the command for a GPU node" >&2
        fi
    fi
    if [ -n "${PRINT:-}" ]; then
        printf '%q ' "${command[@]}" "${flags[@]}"; echo
    else
        "${command[@]}" "${flags[@]}"
    fi
}
