#!/usr/bin/env bash
# Train on all GPUs of this machine, or on its CPUs, with the deepspeed launcher.
#
#   launch_scripts/local.sh CONFIG.yaml [--section.key VALUE ...]
#   PROCESSES=2                number of processes (default: one for each GPU; 1 without GPUs)
#   CUDA_VISIBLE_DEVICES=2,3   GPUs to train on (default: all)
#   TRAINER=trainer.train | trainer.pretrain_lm | trainer.pretrain_vision
#   MASTER_PORT=29500          change it when two runs share the machine
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C asks every process to save and end; a second Ctrl-C ends them at once.
# Exit codes: 0 the run is complete; 75 it was asked to end and saved, start it again; 2 the configuration is wrong; any
# other: the run failed.
#
# Relative paths on the command line are relative to the caller's folder, those in CONFIG.yaml to the clone.
set -euo pipefail
caller="$PWD"
cd "$(dirname "$0")/.."

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
bin="$(cd "${VENV:-.venv}/bin" 2>/dev/null && pwd)" || { echo "there is no ${VENV:-.venv}; run launch_scripts/setup.sh first" >&2; exit 1; }
export PATH="$bin:$PATH"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || gpus=0; fi

# Prints the numbers of the GPUs in CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher takes; it drops the variable itself
# as soon as a number of processes is given.
visible_gpus() {
    local name number
    for name in ${CUDA_VISIBLE_DEVICES//,/ }; do
        number="$name"
        if [[ "$name" == GPU-* ]]; then
            number="$(nvidia-smi --list-gpus | sed -n "s/^GPU \([0-9]*\):.*UUID: $name.*/\1/p")"
        fi
        if [[ ! "$number" =~ ^[0-9]+$ ]] || [ "$number" -ge "$gpus" ]; then
            echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: $name is none of this machine's $gpus GPUs; write their" \
                "numbers or UUIDs (for a MIG device run: python -m ${TRAINER:-trainer.train} CONFIG.yaml)" >&2
            return 2
        fi
        echo "$number"
    done
}

# Batches differ in shape. Without this, torch's allocator splits its memory into pieces that later shapes do not fit.
if [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi
visible=()
if [ "$gpus" -gt 0 ] && [ "${DS_ACCELERATOR:-}" != cpu ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    if [ "$CUDA_VISIBLE_DEVICES" = -1 ]; then CUDA_VISIBLE_DEVICES=""; fi
    numbers="$(visible_gpus)" || exit
    if [ -n "$numbers" ]; then mapfile -t visible <<<"$numbers"; fi
    gpus=${#visible[@]}
fi
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
processes="${PROCESSES:-$((gpus > 0 ? gpus : 1))}"
devices=(--num_accelerators "$processes")
if [ ${#visible[@]} -gt 0 ]; then
    if [ "$processes" -gt "$gpus" ]; then
        echo "PROCESSES=$processes is more than the $gpus GPUs in CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" >&2
        exit 2
    fi
    devices=(--include "localhost:$(IFS=, && echo "${visible[*]:0:processes}")")
    unset CUDA_VISIBLE_DEVICES
fi
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    # The processes share the cores; otherwise each would start a thread for every core.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes ))}"
fi
arguments=("$@")
if [ "$caller" != "$PWD" ]; then
    mapfile -d '' -t arguments < <(python -m trainer.config.caller_paths "$caller" "$@")
    if [ ${#arguments[@]} -eq 0 ]; then exit 1; fi # Python has said why
fi
. launch_scripts/job.sh
run_job deepspeed "${devices[@]}" --master_port "${MASTER_PORT:-29500}" \
    --module "${TRAINER:-trainer.train}" "${arguments[@]}"
