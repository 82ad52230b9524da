#!/usr/bin/env bash
# Compare three ways of combining two data sets in contrastive pretraining, over three seeds.
#
#   launch_scripts/combine_vision.sh
#
#   PROCESSES=2   number of processes that train the language model, whose tokenizer the towers take (default: 2)
#
# Arguments go to trainer.study. The data are the quickstart's digits and easy-VQA's shapes, both from Python packages.
# It takes about an hour on two cores. A second call reuses finished parts and resumes interrupted ones. The settings are
# in configs/studies/combine-vision.yaml, the report is runs/studies/combine-vision/report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch_scripts/demonstration.sh

step "1/5 environment"
SEED=0 # the study has seeds of its own
begin quickstart

step "2/5 data: digits and shapes with captions, as webdataset shards"
python launch_scripts/prepare_digits.py --output data/quickstart
python launch_scripts/prepare_easy_vqa.py --output data/easy_vqa

step "3/5 tokenizer of the captions, with a language model"
launch pretrain_lm language_model.yaml

step "4/5 images for the zero-shot tests, which training does not show"
python launch_scripts/prepare_zero_shot.py --output data/zero_shot/digits data/quickstart/test/held_out/00000.tar
python launch_scripts/prepare_zero_shot.py --output data/zero_shot/shapes data/easy_vqa/validation

step "5/5 twelve runs"
python -m trainer.study configs/studies/combine-vision.yaml "$@"

step "done: runs/studies/combine-vision/report.html"
