#!/usr/bin/env bash
# Train on all GPUs of this machine, or on its CPUs, with the deepspeed launcher.
#
#   launch_scripts/local.sh CONFIG.yaml [--section.key VALUE ...]
#   PROCESSES=2         number of processes (default: one for each GPU; 1 without GPUs)
#   TRAINER=trainer.train | trainer.pretrain_lm | trainer.pretrain_vision
#   MASTER_PORT=29500   change it when two runs share the machine
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C asks every process to save and end; a second Ctrl-C ends them at once.
# Exit codes: 0 the run is complete; 75 it was asked to end and saved, start it again; 2 the configuration is wrong; any
# other: the run failed.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
bin="$(cd "${VENV:-.venv}/bin" 2>/dev/null && pwd)" || { echo "there is no ${VENV:-.venv}; run launch_scripts/setup.sh first" >&2; exit 1; }
export PATH="$bin:$PATH"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || gpus=0; fi
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
processes="${PROCESSES:-$((gpus > 0 ? gpus : 1))}"
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    # The processes share the cores; otherwise each would start a thread for every core.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes ))}"
fi
. launch_scripts/job.sh
run_job deepspeed --num_accelerators "$processes" --master_port "${MASTER_PORT:-29500}" \
    --module "${TRAINER:-trainer.train}" "$@"
