#!/usr/bin/env bash
# Everything as Slurm jobs that wait for each other: text to shards, the teacher's cache, the student, its export.
#
#   launch/slurm/pipeline.sh [--dry-run] [--parts N] [--cache-jobs M] run.yaml [key=value ...] [-- OPTIONS]
#
# OPTIONS are those of data_tools/build_shards.py; without them the shards are there already. --parts N builds them by N
# jobs (default 1). --cache-jobs M makes the cache by M jobs; 0, the default, is for a run that has its teacher live.
# --dry-run prints what would be submitted. Words of sbatch for each stage, such as a partition, stand in
# SHARDS_SBATCH, CACHE_SBATCH, DISTILL_SBATCH and EXPORT_SBATCH.
# A job whose predecessor failed is removed from the queue.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=$(cd "$here/../.." && pwd)
export STILLHOUSE_HOME=${STILLHOUSE_HOME:-$home}
dry=no parts=1 cache_jobs=0
run=() shards=()
usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
}
whole() { # OPTION NUMBER
    [[ $2 =~ ^[0-9]+$ ]] || { echo "$1 $2: expected a number" >&2; exit 2; }
    echo "$2"
}
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=yes ;;
        --parts) parts=$(whole "$1" "${2:-}"); shift ;;
        --cache-jobs) cache_jobs=$(whole "$1" "${2:-}"); shift ;;
        --help | -h) usage; exit 0 ;;
        --) shift; shards=("$@"); break ;;
        -*) echo "$1: unknown; see $0 --help" >&2; exit 2 ;;
        *) run+=("$1") ;;
    esac
    shift
done
if [[ ${#run[@]} -eq 0 ]]; then usage >&2; exit 2; fi
if [[ ! -f ${run[0]} ]]; then echo "${run[0]}: no such file" >&2; exit 2; fi

submitted=()
last=''
submit() { # WORDS-OF-THE-STAGE WORD...: submits a job that waits for the one before
    local words=(sbatch --parsable) more
    read -ra more <<<"$1"
    shift
    if [[ -n $last ]]; then words+=("--dependency=afterok:$last" --kill-on-invalid-dep=yes); fi
    words+=("${more[@]}" "$@")
    if [[ $dry == yes ]]; then
        printf '%q ' "${words[@]}"
        printf '\n'
        last="JOB$((${#submitted[@]} + 1))"
    else
        last=$("${words[@]}") || undo
        last=${last%%;*}
        echo "job $last: ${words[*]}"
    fi
    submitted+=("$last")
}
undo() {
    echo "sbatch refused; cancelling what was submitted: ${submitted[*]:-nothing}" >&2
    if [[ ${#submitted[@]} -gt 0 ]]; then scancel "${submitted[@]}"; fi
    exit 1
}

if [[ ${#shards[@]} -gt 0 ]]; then
    if [[ $parts -gt 1 ]]; then
        submit "${SHARDS_SBATCH:-}" "--array=1-$parts" --export=ALL,STILLHOUSE_MERGE=no "$here/build_shards.sbatch" \
            "${shards[@]}"
        shards+=(--merge "$parts")
    fi
    submit "${SHARDS_SBATCH:-}" "$here/build_shards.sbatch" "${shards[@]}"
fi
if [[ $cache_jobs -gt 0 ]]; then
    submit "${CACHE_SBATCH:-}" "--array=1-$cache_jobs" "$here/cache_teacher.sbatch" "${run[@]}"
fi
submit "${DISTILL_SBATCH:-}" "$here/distill.sbatch" "${run[@]}"
submit "${EXPORT_SBATCH:-}" "$here/export.sbatch" "${run[@]}"
