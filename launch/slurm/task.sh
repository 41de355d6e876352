#!/usr/bin/env bash
# One task of srun: a rank, or with STILLHOUSE_RANKS_OF_TASK all ranks of a node. Passes signals on, ends all of its
# ranks when one fails, and writes down a code that decides what becomes of the job: 2, an error that the user must
# mend; 4, a later launch has taken over.
set -u
ranks=${STILLHOUSE_RANKS_OF_TASK:-0}
pids=()
num_signals=0

# shellcheck disable=SC2317 # called by traps
pass_on() {
    num_signals=$((num_signals + 1))
    kill -s "$1" "${pids[@]}" 2>/dev/null
}

count_alive() {
    local pid
    alive=0
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then alive=$((alive + 1)); fi
    done
}

leave() { # CODE
    if [[ ($1 == 2 || $1 == 4) && -n ${STILLHOUSE_VERDICT:-} ]]; then echo "$1" >"$STILLHOUSE_VERDICT"; fi
    kill -s TERM "${pids[@]}" 2>/dev/null
    for ((tenths = 0; tenths < 150; tenths++)); do
        count_alive
        if [[ $alive == 0 ]]; then break; fi
        sleep 0.1
    done
    kill -s KILL "${pids[@]}" 2>/dev/null
    exit "$1"
}

trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
if [[ $ranks == 0 ]]; then
    "$@" &
    pids=($!)
else
    for ((local_rank = 0; local_rank < ranks; local_rank++)); do
        RANK=$((SLURM_NODEID * ranks + local_rank)) WORLD_SIZE=$((SLURM_STEP_NUM_NODES * ranks)) \
            LOCAL_RANK=$local_rank "$@" &
        pids+=($!)
    done
fi
left=${#pids[@]}
while [[ $left -gt 0 ]]; do
    seen=$num_signals
    wait -n
    code=$?
    if [[ $seen != "$num_signals" ]]; then # a signal ends a wait too
        count_alive
        if [[ $alive == "$left" ]]; then continue; fi
    fi
    if [[ $code != 0 ]]; then leave "$code"; fi
    left=$((left - 1))
done
