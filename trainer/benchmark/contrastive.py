"""``python -m trainer.benchmark contrastive``: measure a contrastive step and the loader's augmentation.

A step has one batch of 64 pairs in 4 micro-batches, a ViT of 4 blocks of width 192 at 64 pixels and a text tower of 4
blocks. Ours is the engine's step under ZeRO-1, with the trainer's settings of DeepSpeed. The baseline
(``tests/benchmarks/accumulation_baseline.py``) is open_clip's step with ``--accum-freq 4``, and torch's AdamW. Both are
in one process and take turns. "error of the temperature's gradient" compares the gradient of ``logit_scale`` with that
of one full batch.

The loader decodes a JPEG, crops, flips, changes colors and resizes to 224 pixels, on one core; the baseline is
open_clip's transform for training with the same changes.
"""

from __future__ import annotations

import copy
import importlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from PIL import Image
from torch import Tensor

from trainer.benchmark.contrastive_step import random_engine
from trainer.benchmark.result_file import Measurement
from trainer.config.contrastive_config import ContrastiveLossConfig
from trainer.config.data_config import AugmentConfig, DataConfig
from trainer.config.run_config import ContrastiveRunConfig, DeepSpeedConfig, OptimizerConfig, TrainingConfig
from trainer.data.batch import Batch
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.deepspeed_engine.engine import Engine
from trainer.runtime.distributed import World, initialize
from trainer.tasks.contrastive.exact_step import ContrastiveStep
from trainer.tasks.contrastive.towers import ContrastiveTowers

BENCHMARK, BASELINE = "contrastive", "open_clip"
ROWS, MICRO_BATCHES, CONTEXT, SIZE = 64, 4, 16, 64
STEPS, REPEATS, WARM_UP = 45, 15, 1
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 1000, "width": 128, "heads": 4, "layers": 4},
}


def run(device: str) -> Iterator[Measurement]:
    """Yield the measurements."""
    world = initialize(timeout_seconds=600)
    config = ContrastiveRunConfig(
        run_dir=Path("unused"),
        data=DataConfig(()),
        training=TrainingConfig(steps=1, dtype="float32"),
        optimizer=OptimizerConfig(weight_decay=0.0, clip_grad_norm="none"),
        deepspeed=DeepSpeedConfig(zero_stage=1),
        architecture=ARCHITECTURE,
    )
    yield from _steps(random_engine(config, world), _batches(), world)
    yield from _augmentation()


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = ROWS // MICRO_BATCHES
    made = []
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(1, 999, (rows, CONTEXT), generator=generator)
        media = torch.randint(0, 256, (rows, 1, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        made.append(Batch("pairs", ids, torch.ones_like(ids), ids, ids, media))
    return made


def _steps(engine: Engine, batches: list[Batch], world: World) -> Iterator[Measurement]:
    baseline = importlib.import_module("tests.benchmarks.accumulation_baseline")
    towers = cast(ContrastiveTowers, engine.module)
    theirs = copy.deepcopy(towers.clip)
    inputs = [_normalized(towers, batch.to(world.device)) for batch in batches]
    exact = _full_gradient(theirs, inputs)
    baseline.accumulate(theirs, inputs)
    wrong = abs(float(theirs.logit_scale.grad) / exact - 1)
    step = ContrastiveStep(ContrastiveLossConfig(), mask_duplicates=False, merged=False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)
    ours = _ours_gradient(towers.clip, batches, world)

    def our_step() -> None:
        step(engine, batches, {"pairs": 1 / ROWS})
        engine.step(1.0)

    def their_step() -> None:
        optimizer.zero_grad()
        baseline.accumulate(theirs, inputs)
        optimizer.step()

    mine, other = _in_turn(our_step, their_step, STEPS)
    yield Measurement.compared(BENCHMARK, "step", "time", "s", mine, BASELINE, other, 1.0)
    error = max(abs(ours / exact - 1), torch.finfo(torch.float32).eps)  # nothing is more exact
    measure = "error of the temperature's gradient"
    yield Measurement.compared(BENCHMARK, "step", measure, "", error, BASELINE, wrong, 1.0)


def _ours_gradient(clip: Any, batches: list[Batch], world: World) -> float:
    """Return our gradient of ``logit_scale``, in a copy without DeepSpeed."""
    module = ContrastiveTowers(copy.deepcopy(clip)).to(world.device)

    class Plain:
        def __init__(self) -> None:
            self.world, self.module = world, module

        def forward(self, inputs: dict[str, Any]) -> Any:
            return module(**inputs)

        def backward(self, loss: Tensor, *, is_last: bool) -> None:
            loss.backward()

    step = ContrastiveStep(ContrastiveLossConfig(), mask_duplicates=False, merged=False)
    step(Plain(), batches, {"pairs": 1 / ROWS})  # type: ignore[arg-type]
    return float(module.clip.logit_scale.grad)


def _normalized(towers: ContrastiveTowers, batch: Batch) -> tuple[Tensor, Tensor]:
    return (batch.media[:, 0] / 255.0 - towers.mean) / towers.std, batch.input_ids


def _full_gradient(clip: Any, inputs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the gradient of ``logit_scale`` of one full batch, and leave no gradients behind."""
    images, captions = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    ClipLoss()(*clip(images, captions)).backward()
    gradient = float(clip.logit_scale.grad)
    clip.zero_grad()
    return gradient


def _in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """Return the median seconds of two functions that are called in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + repeats):
        for function, kept in zip((first, second), seconds, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= WARM_UP:
                kept.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _augmentation() -> Iterator[Measurement]:
    """Measure the loader's time of an image on one core: with all changes, and with colors left to the device."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    jpeg = file.getvalue()
    augment = AugmentConfig(
        horizontal_flip=0.5, crop_scale=(0.4, 1.0), brightness=0.32, contrast=0.32, saturation=0.32, hue=0.08
    )
    decoder = ImageDecoder(224, "stretch", (0, 0, 0), augment=augment)
    members = {"jpg": jpeg}
    changes = {"scale": (0.4, 1.0), "color_jitter": (0.32, 0.32, 0.32, 0.08), "use_timm": True}
    transform = open_clip.image_transform(224, is_train=True, aug_cfg=changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, theirs = _in_turn(
            lambda: [decoder(jpeg, rng) for _ in range(20)],
            lambda: [transform(Image.open(io.BytesIO(jpeg))) for _ in range(20)],
        )
        on_device, theirs_again = _in_turn(
            lambda: [decoder.without_colors(members, rng) for _ in range(20)],
            lambda: [transform(Image.open(io.BytesIO(jpeg))) for _ in range(20)],
        )
    finally:
        torch.set_num_threads(threads)
    for case, mine, other in (("", ours, theirs), (", colors on the device", on_device, theirs_again)):
        yield Measurement.compared(
            BENCHMARK,
            f"640 x 480 JPEG, augmented{case}",
            "time of an image",
            "s",
            mine / 20,
            BASELINE,
            other / 20,
            3.0,
        )
