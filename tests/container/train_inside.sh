#!/usr/bin/env bash
# Train a few steps inside an image, on the CPU: a language model on two processes, and a Flamingo on one, which then
# writes a text for an image.
#
#   SHARED=FOLDER   folder with configs/ and launch_scripts/ (default: where the image has them)
set -euo pipefail
cd "$(mktemp -d)"
shared=${SHARED:-/opt/flamingo/share/flamingo-trainer}
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
python "$shared/launch_scripts/prepare_digits.py" --output data/quickstart
deepspeed --num_accelerators 2 --module trainer.pretrain_lm "$shared/configs/quickstart/language_model.yaml" \
    --training.steps 3 --schedule.warmup_steps 1
ls runs/quickstart/language_model/export
python -m trainer.train "$shared/configs/debug.yaml" --training.steps 3 --schedule.warmup_steps 1 --checkpoint.every 3 \
    --deepspeed.zero_stage 2
shard=$(find data/quickstart/train/pairs -name '*.tar' -print -quit)
image=$(tar -tf "$shard" | awk '/\.(png|jpg)$/ && !found++')
tar -xf "$shard" "$image"
python -m trainer.generate runs/debug/export --image "$image"
