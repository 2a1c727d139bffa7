# shellcheck shell=bash
# What train_parallel.sh and train_serial.sh have in common: one task per GPU, and what follows when they end.
set -euo pipefail
source slurm/site.sh

# Where the run goes: the same folder after a requeue, so that it finds its checkpoints.
output_dir_of() {
    local folder="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" argument
    for argument in "$@"; do
        if [[ $argument == output_dir=* ]]; then folder="${argument#output_dir=}"; fi
    done
    echo "$folder"
}

train() {
    local output_dir nodes tasks_per_node cpus_per_task
    output_dir="$(output_dir_of "$@")"
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # One task per GPU; without GPUs, as many as were asked for.
    tasks_per_node="${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}"
    # srun does not take it over from sbatch since Slurm 22.05, and would give each task one CPU.
    cpus_per_task=$((SLURM_CPUS_ON_NODE / tasks_per_node))
    if ((cpus_per_task < 1)); then
        echo "error: $tasks_per_node tasks and $SLURM_CPUS_ON_NODE CPUs on a node: ask for more by --cpus-per-task" >&2
        exit 1
    fi
    export MASTER_ADDR="${nodes[0]}"
    # Jobs that share a node get ports of their own.
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

    local command=(
        "${CONTAINER[@]}" "$PYTHON" mobius_train/main.py
        "output_dir=$output_dir" resume_from_checkpoint=auto "$@"
    )
    echo "job        $SLURM_JOB_ID ($SLURM_JOB_NAME), start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T')"
    echo "nodes      ${#nodes[@]}: ${nodes[*]}"
    echo "tasks      $tasks_per_node per node, GPUs per node: ${SLURM_GPUS_ON_NODE:-none}, CPUs per task: $cpus_per_task"
    echo "rank 0     $MASTER_ADDR:$MASTER_PORT"
    echo "output     $output_dir"
    echo "command    ${command[*]}"

    # A request that the last start has left must not stop this one.
    rm -f "$output_dir/stop" "$output_dir/stopped"
    signalled=
    trap 'signalled=yes; mkdir -p "'"$output_dir"'" && touch "'"$output_dir"'/stop"' USR1 TERM
    # In the background, or bash would run the trap only after srun has ended. --wait: when a node is dead the other ranks
    # end, but srun would wait for its tasks until Slurm has given the node up (SlurmdTimeout, often 5 minutes).
    srun --kill-on-bad-exit=1 --wait=5 --nodes="${#nodes[@]}" --ntasks=$((${#nodes[@]} * tasks_per_node)) \
        --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" "${command[@]}" &
    local srun_pid=$! status
    while
        signalled=
        status=0
        wait "$srun_pid" || status=$?
        # A signal has ended the waiting, and not srun.
        [[ -n $signalled ]]
    do :; done
    finish "$status" "$output_dir"
}

# Requeue what was stopped, and once at each step what has failed.
finish() {
    local status="$1" output_dir="$2"
    if ((status == 0)); then exit 0; fi
    # Slurm requeues a job itself that it preempts, and one that was cancelled must stay so.
    if [[ "$(squeue --noheader --format=%T --job="$SLURM_JOB_ID")" != RUNNING ]]; then exit "$status"; fi
    if [[ ! -e "$output_dir/stopped" ]]; then
        "${CONTAINER[@]}" "$PYTHON" tools/record_failure.py "$output_dir" \
            --exit-code="$status" --job="$SLURM_JOB_ID" || exit "$status"
    fi
    echo "exit code $status: the job is requeued"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
}
