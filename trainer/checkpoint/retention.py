"""Decide which checkpoints are kept, and remove the others, without torch.

Kept are the last ones, those of every n-th step, the best ones, and the one that ``latest`` names. The best have the
lowest training loss, or the highest score of an evaluation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.catalog import complete_steps, latest_step, steps_in
from trainer.checkpoint.layout import MANIFEST, tag_of
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.run_folder import RunFolder

SMOOTHED_STEPS = 100


def smoothed_losses(metrics: Path, steps: Sequence[int]) -> dict[int, float]:
    """Return, for each of ``steps``, the mean training loss of the ``SMOOTHED_STEPS`` steps that end with it.

    Skipped steps do not count. A step without any loss before it is left out.

    Args:
        metrics: The run's metrics.jsonl.
        steps: Steps of checkpoints.
    """
    losses = {
        record["step"]: record["loss"]
        for record in _records(metrics)
        if record.get("loss") is not None and not record.get("step_skipped")
    }
    means = {}
    for step in steps:
        window = [losses[near] for near in range(step - SMOOTHED_STEPS + 1, step + 1) if near in losses]
        if window:
            means[step] = sum(window) / len(window)
    return means


def last_scores(metrics: Path, name: str, steps: Sequence[int]) -> dict[int, float]:
    """Return, for each of ``steps``, the last score up to it; a step without any score before it is left out.

    Args:
        metrics: The run's metrics.jsonl.
        name: Name of the score ("eval/coco/4").
        steps: Steps of checkpoints.
    """
    scores = score_history(metrics, name)
    found = {}
    for step in steps:
        measured = max((near for near in scores if near <= step), default=None)
        if measured is not None:
            found[step] = scores[measured]
    return found


def score_history(metrics: Path, name: str) -> dict[int, float]:
    """Return every value of a score in metrics.jsonl by its step."""
    return {record["step"]: record[name] for record in _records(metrics) if record.get(name) is not None}


def best_step(folder: Path, config: CheckpointConfig) -> int | None:
    """Return the step of the best complete checkpoint; None where no score is known.

    Args:
        folder: ``checkpoints`` of a run folder.
        config: What makes a checkpoint the best.
    """
    values = _values(RunFolder(folder.parent).metrics, config.best_metric, complete_steps(folder))
    return min(values, key=lambda step: (values[step], -step), default=None)


def _records(metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl."""
    if metrics.is_file():
        with metrics.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):  # otherwise a writer is at work, or a kill cut the line off
                    yield json.loads(line)


def kept_steps(steps: Sequence[int], config: CheckpointConfig, losses: Mapping[int, float]) -> set[int]:
    """Return the steps whose checkpoints the settings keep.

    Args:
        steps: Steps of all complete checkpoints, in ascending order.
        config: How many checkpoints to keep.
        losses: Value by step that is lowest for the best: the smoothed loss, or a score times -1.
    """
    kept = set(steps[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    known = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], -step))
    return kept | set(known[: config.keep_best])


def _values(metrics: Path, name: str, steps: Sequence[int]) -> dict[int, float]:
    if name == "loss":
        return smoothed_losses(metrics, steps)
    return {step: -score for step, score in last_scores(metrics, name, steps).items()}


def expired(folder: Path, config: CheckpointConfig) -> list[Path]:
    """Return the checkpoints that may be removed, incomplete ones included; never the one that ``latest`` names.

    Args:
        folder: ``checkpoints`` of a run folder.
        config: How many checkpoints to keep.
    """
    complete = complete_steps(folder)
    losses = _values(RunFolder(folder.parent).metrics, config.best_metric, complete) if config.keep_best else {}
    kept = kept_steps(complete, config, losses) | {latest_step(folder)}
    return [folder / tag_of(step) for step in steps_in(folder) if step not in kept]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; a crash in the middle leaves an incomplete one, never one that seems good.

    Of a symbolic link, only the link is removed: the folder behind it may be somebody's copy.

    Raises:
        OSError: A file cannot be removed.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    # Without its manifest the folder is not a checkpoint.
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
