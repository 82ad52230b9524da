#!/usr/bin/env bash
# Train a small Flamingo to answer the questions of easy-VQA, and score it on all of its test questions.
#
#   launch_scripts/easy_vqa.sh
#
#   PROCESSES=2   number of processes that train (default: 2)
#   SEED=0        seed of data and training (default: 0)
#
# Images and questions come from the package easy-vqa, so nothing else is downloaded. It takes about twenty minutes on two
# cores. A second call reuses finished parts and resumes interrupted ones. The settings are in configs/easy_vqa/, the
# results in runs/easy_vqa/: report.json, predictions.jsonl and report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch_scripts/demonstration.sh

step "1/6 environment"
begin easy_vqa

step "2/6 data: images, captions and questions as webdataset shards"
python launch_scripts/prepare_easy_vqa.py --output "$data" --seed "$seed"

step "3/6 language model, by pretraining on text"
launch pretrain_lm language_model.yaml

step "4/6 image tower, by contrastive pretraining"
launch pretrain_vision vision.yaml

step "5/6 Flamingo on $processes processes, trained on captions and on the answers to questions"
launch train flamingo.yaml

step "6/6 answers to the test questions, with the right image, another one and none"
evaluate evaluate.yaml

step "done: $runs/report.html"
