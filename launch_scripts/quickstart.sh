#!/usr/bin/env bash
# Set up a machine that has only Python, then train and evaluate a small Flamingo. It needs no GPU.
#
#   launch_scripts/quickstart.sh
#
#   QUICKSTART_PROCESSES=2   number of processes that train (default: 2)
#
# A second call reuses finished parts and resumes interrupted ones. Ctrl-C saves the part that trains; a second one ends
# it at once. The settings are in configs/quickstart/, the results
# in runs/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS
step() { printf '\n\033[1m== %s\033[0m (%d s)\n' "$1" "$((SECONDS - started))"; }

step "1/6 environment"
launch_scripts/setup.sh
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
started=$SECONDS # the times shown do not count the installation

processes=${QUICKSTART_PROCESSES:-2}
# Each process gets one thread, because the machine may have only two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
if ! nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
. launch_scripts/job.sh
launch() {
  local port=$((20000 + RANDOM % 20000))
  run_job deepspeed --log_level warning --num_accelerators "$processes" --master_port "$port" --module "trainer.$1" "$2"
  if [ "$stop_requested" = 1 ]; then exit 75; fi
}

step "2/6 data: handwritten digits as webdataset shards"
python launch_scripts/prepare_digits.py --output data/quickstart

step "3/6 language model, by pretraining on text"
launch pretrain_lm configs/quickstart/language_model.yaml

step "4/6 image tower, by contrastive pretraining"
launch pretrain_vision configs/quickstart/vision.yaml

step "5/6 Flamingo: ZeRO-3 on $processes processes, frozen language model partitioned and offloaded"
launch train configs/quickstart/flamingo.yaml

step "6/6 captions for images that training never showed"
python -m trainer.evaluate configs/quickstart/evaluate.yaml

step "done"
