#!/usr/bin/env bash
# From a bare machine with Python to a trained and evaluated small Flamingo. No GPU needed.
#
#   launch_scripts/quickstart.sh
#
# What is there already is used again; what was interrupted goes on where it stopped. Results: runs/quickstart/.
# QUICKSTART_PROCESSES (default 2) says how many processes train. Training settings are in configs/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS
step() { printf '\n\033[1m== %s\033[0m (%d s)\n' "$1" "$((SECONDS - started))"; }

step "1/6 environment"
launch_scripts/setup.sh
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
started=$SECONDS # installing is not part of the run

processes=${QUICKSTART_PROCESSES:-2}
# One thread a process: two processes share what may be two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
if ! nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
launch() {
  local port=$((20000 + RANDOM % 20000))
  deepspeed --log_level warning --num_accelerators "$processes" --master_port "$port" --module "trainer.$1" "$2"
}

step "2/6 data: handwritten digits as webdataset shards"
python launch_scripts/prepare_digits.py --output data/quickstart

step "3/6 language model, on text only"
launch pretrain_lm configs/quickstart/language_model.yaml

step "4/6 image tower, contrastively"
launch pretrain_vision configs/quickstart/vision.yaml

step "5/6 Flamingo: ZeRO-3, $processes processes, the frozen language model partitioned and offloaded"
launch train configs/quickstart/flamingo.yaml

step "6/6 captions for images that it never saw"
python -m trainer.evaluate configs/quickstart/evaluate.yaml

step "done"
