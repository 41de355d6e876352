# shellcheck shell=bash
# What the batch scripts of this folder share; they source it. Variables that a user may set:
#
#   STILLHOUSE_HOME       the checkout (default: the folder in which sbatch was called)
#   STILLHOUSE_PYTHON     default: .venv/bin/python of the checkout, else python; in a container, python
#   STILLHOUSE_RANKS      ranks of a node (default: its GPUs; without any, --ntasks-per-node; else 1)
#   STILLHOUSE_TASKS      gpu: srun starts one task a rank (default); node: one a node, which starts the ranks
#   STILLHOUSE_CONTAINER  image.sif for Apptainer, anything else (image.sqsh, a registry's name) for Enroot by pyxis
#   STILLHOUSE_MOUNTS     further folders for the container, as from:to,from:to

# shellcheck disable=SC2034,SC2154 # the scripts give home and restarts, and use folder, step_done, finished, cached
readonly max_idle_restarts=3
job=${SLURM_JOB_ID:-0}
num_signals=0
signalled=
code=0

say() {
    printf '%s stillhouse, job %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$job" "$*"
}

give_up() { # CODE MESSAGE
    say "$2"
    exit "$1"
}

prepare() {
    inside=()
    container=()
    local mounts=${STILLHOUSE_MOUNTS:+,$STILLHOUSE_MOUNTS}
    python=${STILLHOUSE_PYTHON:-python}
    case ${STILLHOUSE_CONTAINER:-} in
        '')
            if [[ -z ${STILLHOUSE_PYTHON:-} && -x $home/.venv/bin/python ]]; then
                python=$home/.venv/bin/python
            fi
            ;;
        *.sif)
            inside=(apptainer exec --nv --bind "$home:$home,$PWD:$PWD$mounts" --pwd "$PWD" "$STILLHOUSE_CONTAINER")
            ;;
        *)
            container=("--container-image=$STILLHOUSE_CONTAINER" "--container-workdir=$PWD"
                "--container-mounts=$home:$home,$PWD:$PWD$mounts")
            ;;
    esac
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    ranks=${STILLHOUSE_RANKS:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
    if [[ $ranks == 0 ]]; then ranks=1; fi
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_ADDR
    export MASTER_PORT=${MASTER_PORT:-$((15000 + job % 15000))}
}

# The words of srun for RANKS ranks on each of NODES nodes.
step_words() { # NODES RANKS
    local cpus=${SLURM_CPUS_ON_NODE:-1} tasks=$2
    if [[ ${STILLHOUSE_TASKS:-gpu} == node ]]; then
        tasks=1
        export STILLHOUSE_RANKS_OF_TASK=$2
    else
        export STILLHOUSE_RANKS_OF_TASK=0
    fi
    local each=$((cpus / tasks))
    if [[ $tasks == "$2" && -n ${SLURM_CPUS_PER_TASK:-} ]]; then each=$SLURM_CPUS_PER_TASK; fi
    words=(srun "--nodes=$1" "--ntasks=$(($1 * tasks))" "--ntasks-per-node=$tasks" --kill-on-bad-exit=1)
    if [[ $each -ge 1 ]]; then words+=("--cpus-per-task=$each"); else words+=(--overcommit); fi
    words+=("${container[@]}")
}

# Run a program once, on this node. Its output is ours.
run_alone() {
    if [[ ${#container[@]} -gt 0 ]]; then
        srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$@"
    else
        "${inside[@]}" "$@"
    fi
}

pass_on() { # SIGNAL
    num_signals=$((num_signals + 1))
    signalled=$1
    say "$1 was received; the ranks are asked for a checkpoint"
    asked_at=${asked_at:-$SECONDS}
    kill -s USR1 "$step" 2>/dev/null # never TERM: srun would kill the ranks at once
}

# Run a program on every rank and wait for its end. Sets code and signalled, and verdict to what a rank left with: 2, an
# error that its user must mend, or 4, a later launch has taken over. srun's own code is that of a rank which it killed.
run_ranks() { # NODES RANKS PROGRAM...
    local nodes=$1 per_node=$2 seen now
    shift 2
    step_words "$nodes" "$per_node"
    export STILLHOUSE_VERDICT=$mark_folder/.verdict-$job-${SLURM_RESTART_COUNT:-0}
    rm -f "$STILLHOUSE_VERDICT"
    "${words[@]}" "${inside[@]}" bash "$home/launch/slurm/task.sh" "$@" &
    step=$!
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    while :; do
        seen=$num_signals
        wait "$step"
        now=$?
        if [[ $now != 127 ]]; then code=$now; fi
        if [[ $seen == "$num_signals" ]]; then break; fi
    done
    trap '' USR1
    verdict=$(cat "$STILLHOUSE_VERDICT" 2>/dev/null) || verdict=$code
    rm -f "$STILLHOUSE_VERDICT"
    if [[ -n $signalled ]]; then
        say "the ranks ended with code $code, $((SECONDS - asked_at)) s after $signalled"
    fi
}

# Restarts are counted by this job's lines in a file: the progress that each of its launches began with.
is_stuck() { # PROGRESS
    local same
    same=$(grep -s "^job $job restart [1-9]" "$restarts" | tail -n "$max_idle_restarts" | grep -c " progress $1\$")
    [[ $same -ge $max_idle_restarts ]]
}

begin_launch() { # PROGRESS UNIT
    mark_folder=$(dirname "$restarts")
    mkdir -p "$mark_folder" || give_up 2 "$mark_folder cannot be made"
    stop_if_stuck "$@"
    printf 'job %s restart %s at %s progress %s\n' "$job" "${SLURM_RESTART_COUNT:-0}" "$(date +%s)" "$1" >>"$restarts"
}

stop_if_stuck() { # PROGRESS UNIT
    if is_stuck "$1"; then
        give_up 1 "no progress in $max_idle_restarts restarts running, each began and ended at $2 $1; see the log above, \
mend the cause and submit the job again"
    fi
}

seconds_of() { # Slurm's D-HH:MM:SS
    local days=0 rest=$1 hours minutes seconds
    if [[ $rest == *-* ]]; then days=${rest%%-*} rest=${rest#*-}; fi
    IFS=: read -r hours minutes seconds <<<"$rest"
    echo $((((days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
}

# A job that is being ended shows COMPLETING whatever the cause: its time limit, a preemption, or somebody's scancel.
was_cancelled() { # WHAT SCONTROL SHOWS
    case $1 in
        *JobState=CANCELLED*) return 0 ;;
        *JobState=COMPLETING*) ;;
        *) return 1 ;;
    esac
    if [[ $1 =~ \ PreemptTime=([^ ]+) && ${BASH_REMATCH[1]} != None ]]; then return 1; fi
    [[ $1 =~ \ TimeLimit=([0-9][0-9:-]*) ]] || return 0
    local limit=${BASH_REMATCH[1]}
    [[ $1 =~ \ RunTime=([0-9][0-9:-]*) ]] || return 0
    [[ $(seconds_of "${BASH_REMATCH[1]}") -lt $(seconds_of "$limit") ]]
}

# Put this job back into the queue, unless it was cancelled, is at fault, or makes no progress.
requeue() { # PROGRESS UNIT
    case $verdict in
        2) give_up 2 "an error to mend, see above; not requeued. Submit the job again once it is mended" ;;
        4) give_up 4 "a later launch goes on with this run; this one leaves" ;;
    esac
    local shown
    for _ in 1 2 3; do
        shown=$(scontrol --oneliner show job "$job" 2>/dev/null) && break
        sleep 1
    done
    if was_cancelled "$shown"; then
        give_up 0 "cancelled; not requeued. Submit the job again to go on from $2 $1"
    fi
    if [[ $shown =~ \ Restarts=([0-9]+) && ${BASH_REMATCH[1]} != "${SLURM_RESTART_COUNT:-0}" ]]; then
        give_up 4 "Slurm has started this job again already; this launch leaves"
    fi
    if [[ $signalled == TERM ]]; then
        say "requeued, to go on from what was saved last"
    else
        stop_if_stuck "$@"
        say "requeued, to go on from $2 $1"
    fi
    trap 'exit 0' TERM
    for _ in 1 2 3 4 5 6; do
        if scontrol requeue "$job"; then
            sleep 120 & # Slurm ends this script; until it does, the job has not ended
            wait $!
            exit 0
        fi
        sleep 10
    done
    give_up 1 "could not be requeued; submit the job again to go on from $2 $1"
}

# Sets folder, step, finished and cached of the run.
read_state() { # run.yaml [key=value ...]
    local name value lines
    lines=$(run_alone "$python" "$home/launch/run_state.py" --config "$@") || give_up 2 "the run could not be read"
    while IFS='=' read -r name value; do
        case $name in
            folder) folder=$value ;;
            step) step_done=$value ;;
            finished) finished=$value ;;
            cached) cached=$value ;;
        esac
    done <<<"$lines"
}
