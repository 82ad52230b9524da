#!/usr/bin/env bash
# Show in-context learning from images: a small Flamingo names pictures by the demonstrations in its prompt.
#
#   launch_scripts/in_context.sh
#
#   PROCESSES=2   number of processes that train (default: 2)
#   SEED=0        seed of data and training (default: 0)
#
# A language model learns from text alone to look things up in its context. It is frozen and learns to see. Then it has
# to name held-out pictures with invented words that occur in no training data, so it can know them only from the
# prompt. Controls exchange, shuffle or remove the images. docs/in_context.md explains the results.
#
# It takes up to half an hour on two cores. A second call reuses finished parts and resumes interrupted ones. The
# settings are in configs/in_context/, the results in runs/in_context/: report.json, predictions.jsonl and report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch_scripts/demonstration.sh

step "1/6 environment"
begin in_context

step "2/6 data: pages of text, documents of handwritten digits, episodes for the evaluation"
python launch_scripts/prepare_in_context.py --output "$data" --seed "$seed"

step "3/6 language model, by pretraining on text"
launch pretrain_lm language_model.yaml

step "4/6 image tower, by contrastive pretraining"
launch pretrain_vision vision.yaml

step "5/6 Flamingo: ZeRO-3 on $processes processes, frozen language model partitioned and offloaded"
launch train flamingo.yaml

step "6/6 names of held-out pictures, by the number of demonstrations and with controls"
evaluate evaluate.yaml

step "done: $runs/report.html"
