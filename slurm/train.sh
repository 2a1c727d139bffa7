# shellcheck shell=bash
# Shared part of train_parallel.sh and train_serial.sh: starts one task per GPU and handles stops and failures.
set -euo pipefail
source slurm/site.sh

# Set output_dir, the run's folder, and overrides, the other arguments. The folder is the same after a requeue, so that
# the run finds its checkpoints.
read_arguments() {
    output_dir="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
    overrides=()
    local argument
    for argument in "$@"; do
        if [[ $argument == output_dir=* ]]; then
            output_dir="${argument#output_dir=}"
        else
            overrides+=("$argument")
        fi
    done
    # YAML reads line ends as spaces, so the run would be in another folder than its stop request.
    if [[ $output_dir =~ [[:cntrl:]]|$'\xc2\x85'|$'\xe2\x80\xa8'|$'\xe2\x80\xa9' ]]; then
        printf 'error: %q contains a control character: give another output_dir or --job-name\n' "$output_dir" >&2
        exit 1
    fi
}

# Names are expanded here, when the signal comes, and never become part of a command's text.
ask_to_stop() {
    signalled=yes
    { mkdir -p -- "$output_dir" && touch -- "$output_dir/stop"; } || echo "error: the run cannot be asked to stop" >&2
}

train() {
    local nodes tasks_per_node cpus_per_task
    read_arguments "$@"
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # One task per GPU; without GPUs, the requested number.
    tasks_per_node="${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}"
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch, and would give each task one CPU.
    cpus_per_task=$((SLURM_CPUS_ON_NODE / tasks_per_node))
    if ((cpus_per_task < 1)); then
        echo "error: $SLURM_CPUS_ON_NODE CPUs per node for $tasks_per_node tasks: request more with --cpus-per-task" >&2
        exit 1
    fi
    export MASTER_ADDR="${nodes[0]}"
    # Jobs that share a node need different ports.
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

    # A folder that mobius-files made has no checkout, but the package is installed.
    local main=(mobius_train/main.py)
    [[ -f ${main[0]} ]] || main=(-m mobius_train.main)
    # The training reads values as YAML; in single quotes, any name is a text.
    local quote="'"
    local command=(
        "${CONTAINER[@]}" "$PYTHON" "${main[@]}"
        "output_dir='${output_dir//$quote/$quote$quote}'" resume_from_checkpoint=auto "${overrides[@]}"
    )
    echo "job        $SLURM_JOB_ID ($SLURM_JOB_NAME), start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T')"
    echo "nodes      ${#nodes[@]}: ${nodes[*]}"
    echo "tasks      $tasks_per_node per node, GPUs per node: ${SLURM_GPUS_ON_NODE:-none}, CPUs per task: $cpus_per_task"
    echo "rank 0     $MASTER_ADDR:$MASTER_PORT"
    echo "output     $output_dir"
    echo "command    ${command[*]}"

    # Remove stop requests of an earlier start.
    rm -f -- "$output_dir/stop" "$output_dir/stopped"
    signalled=
    trap ask_to_stop USR1 TERM
    # srun runs in the background, because bash would otherwise delay the trap until srun ends. Without --wait, srun
    # would wait for a dead node's tasks until Slurm declares the node down (SlurmdTimeout, often 5 minutes).
    srun --kill-on-bad-exit=1 --wait=5 --nodes="${#nodes[@]}" --ntasks=$((${#nodes[@]} * tasks_per_node)) \
        --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" "${command[@]}" &
    local srun_pid=$! status
    while
        signalled=
        status=0
        wait "$srun_pid" || status=$?
        # If a signal interrupted the wait, srun is still running.
        [[ -n $signalled ]]
    do :; done
    finish "$status"
}

# Requeue a stopped job, and a failed one unless it failed at the same step before.
finish() {
    local status="$1"
    if ((status == 0)); then exit 0; fi
    # Slurm requeues preempted jobs by itself, and a cancelled job must not be requeued.
    if [[ "$(squeue --noheader --format=%T --job="$SLURM_JOB_ID")" != RUNNING ]]; then exit "$status"; fi
    if [[ ! -e "$output_dir/stopped" ]]; then
        "${CONTAINER[@]}" "$PYTHON" tools/record_failure.py --exit-code="$status" \
            --job="$SLURM_JOB_ID" -- "$output_dir" || exit "$status"
    fi
    echo "exit code $status: the job is requeued"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
}
