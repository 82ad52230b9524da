"""Which checkpoints are kept: the last ones, every n-th, the best, and what ``latest`` names. Needs no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.checkpoint.catalog import is_complete, latest_step, steps_in
from trainer.checkpoint.training_state import MANIFEST, tag_of
from trainer.config.run_config import CheckpointConfig

SMOOTHED_STEPS = 100


def smoothed_losses(metrics: Path, steps: Sequence[int]) -> dict[int, float]:
    """The mean training loss over the last ``SMOOTHED_STEPS`` steps up to each of ``steps``, from metrics.jsonl.

    Steps without a loss (skipped ones) do not count; a checkpoint with none before it is left out.
    """
    losses: dict[int, float] = {}
    if metrics.is_file():
        with metrics.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):  # a line that is being written, or that a kill cut off, has none
                    record = json.loads(line)
                    if record.get("loss") is not None and not record.get("step_skipped"):
                        losses[record["step"]] = record["loss"]
    means = {}
    for step in steps:
        window = [losses[near] for near in range(step - SMOOTHED_STEPS + 1, step + 1) if near in losses]
        if window:
            means[step] = sum(window) / len(window)
    return means


def kept_steps(steps: Sequence[int], config: CheckpointConfig, losses: Mapping[int, float]) -> set[int]:
    """Of complete checkpoints' steps, in order, those that the settings keep. losses: smoothed, by step."""
    kept = set(steps[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    known = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], -step))
    return kept | set(known[: config.keep_best])


def expired(folder: Path, config: CheckpointConfig) -> list[Path]:
    """The checkpoints of ``folder`` that may go, half-written ones included; never the one that ``latest`` names."""
    steps = steps_in(folder)
    complete = [step for step in steps if is_complete(folder / tag_of(step))]
    losses = smoothed_losses(folder.parent / "metrics.jsonl", complete) if config.keep_best else {}
    kept = kept_steps(complete, config, losses) | {latest_step(folder)}
    return [folder / tag_of(step) for step in steps if step not in kept]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash in mid-removal leaves none that seems good. Raises: OSError."""
    # Without its manifest a checkpoint does not exist.
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
