#!/usr/bin/env bash
# Train on this machine with all its GPUs, or on its CPUs: a thin wrapper around the deepspeed launcher.
#
#   launch_scripts/local.sh CONFIG.yaml [--section.key VALUE ...]
#   PROCESSES=2         processes to start (default: one a GPU; 1 without GPUs)
#   TRAINER=trainer.train | trainer.pretrain_lm | trainer.pretrain_vision
#   MASTER_PORT=29500   change it when two runs share the machine
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
bin="$(cd "${VENV:-.venv}/bin" 2>/dev/null && pwd)" || { echo "no .venv here; run launch_scripts/setup.sh first" >&2; exit 1; }
export PATH="$bin:$PATH"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || gpus=0; fi
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
processes="${PROCESSES:-$((gpus > 0 ? gpus : 1))}"
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    # Processes that each start a thread a core stand in each other's way.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes ))}"
fi
exec deepspeed --num_accelerators "$processes" --master_port "${MASTER_PORT:-29500}" \
    --module "${TRAINER:-trainer.train}" "$@"
