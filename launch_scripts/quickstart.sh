#!/usr/bin/env bash
# Set up a machine that has only Python, then train and evaluate a small Flamingo. It needs no GPU.
#
#   launch_scripts/quickstart.sh
#
#   PROCESSES=2   number of processes that train (default: 2)
#   SEED=0        seed of data and training (default: 0)
#
# A second call reuses finished parts and resumes interrupted ones. Ctrl-C saves the part that trains; a second one ends
# it at once. The settings are in configs/quickstart/, the results in runs/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch_scripts/demonstration.sh

step "1/6 environment"
begin quickstart

step "2/6 data: handwritten digits as webdataset shards"
python launch_scripts/prepare_digits.py --output "$data" --seed "$seed"

step "3/6 language model, by pretraining on text"
launch pretrain_lm language_model.yaml

step "4/6 image tower, by contrastive pretraining"
launch pretrain_vision vision.yaml

step "5/6 Flamingo: ZeRO-3 on $processes processes, frozen language model partitioned and offloaded"
launch train flamingo.yaml

step "6/6 captions for images that training never showed"
python -m trainer.evaluate "$(configuration evaluate.yaml)"

step "done"
