"""Predict the most memory that a device holds at any moment of a contrastive step.

Beside the moments of any micro-batch (``trainer.planning.peak_memory``), a step has a pass without a graph, and the
loss, with the features of all processes. ``tests/tasks/test_contrastive_plan.py`` compares it with DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.activations import Activations
from trainer.planning.peak_memory import (
    Parts,
    PeakMemory,
    Sizes,
    between_micro_batches,
    moments_of_micro_batch,
    permanent_parts,
)
from trainer.tasks.contrastive.step_counts import TowerMemory

_FLOAT32 = 4


@dataclass(frozen=True)
class Problem:
    """Describe a contrastive problem of a step on one process.

    Attributes:
        name: Name of its source.
        rows: Pairs of this process.
        rows_again: Those of them whose forward is run twice: all but the first micro-batch.
        columns: Pairs of all processes.
        dim: Length of a feature.
        micro_batches: Micro-batches of this process.
        towers: Memory of the largest of them.
        first_saved: Bytes that the forward of the first of them leaves for its backward.
        loss: Bytes of a chunk of logits and what is made of it.
    """

    name: str
    rows: int
    rows_again: int
    columns: int
    dim: int
    micro_batches: int
    towers: TowerMemory
    first_saved: int
    loss: int

    @property
    def features(self) -> int:
        """Numbers in the features of this process, of images and captions."""
        return 2 * self.rows * self.dim

    @property
    def all_features(self) -> int:
        """Numbers in the features of all processes, of images and captions."""
        return 2 * self.columns * self.dim


def contrastive_peak_memory(sizes: Sizes, zero: Mapping[str, Any], problems: Sequence[Problem]) -> PeakMemory:
    """Return the memory at the moment that needs most.

    Args:
        sizes: Sizes of the towers.
        zero: ``zero_optimization`` of DeepSpeed's json.
        problems: Problems of a step, in their order.
    """
    moments = [
        (f"{moment} of {problem.name}", parts)
        for number, problem in enumerate(problems)
        for moment, parts in _moments(sizes, zero, problem, after_another=number > 0)
    ]
    name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return PeakMemory(name, permanent_parts(sizes, zero) | parts)


def _moments(
    sizes: Sizes, zero: Mapping[str, Any], problem: Problem, after_another: bool
) -> Iterator[tuple[str, Parts]]:
    """Yield what exists beside the permanent tensors."""
    towers, several = problem.towers, problem.micro_batches > 1
    before = between_micro_batches(sizes, zero) if after_another else {}
    features = float(sizes.itemsize * problem.features)
    if several:
        yield "the first pass", before | {"features": features, "temporaries": towers.without_graph}
    yield "the loss", before | _of_the_loss(sizes, problem) | {"saved activations": problem.first_saved}
    gradients = {"features": features * several, "gradients of features": float(_FLOAT32 * problem.features)}
    activations = Activations(towers.saved, towers.peak, (), towers.image_tower)
    for moment, found in moments_of_micro_batch(sizes, zero, activations, after_another or several):
        # The loss is known by now: this is the start of the backward.
        yield ("the backward" if moment == "the loss" else moment), gradients | found


def _of_the_loss(sizes: Sizes, problem: Problem) -> Parts:
    """Return the tensors of ``losses.solve``: float32 copies, gradients, and the features of all processes."""
    copies = problem.features * (sizes.itemsize + _FLOAT32 * (sizes.itemsize < _FLOAT32))
    if problem.micro_batches > 1:
        copies += problem.features * sizes.itemsize  # of the micro-batches, which are joined
    return {
        "features": float(copies),
        "gradients of features": float(_FLOAT32 * (problem.features + problem.all_features)),
        "features of all processes": float(_FLOAT32 * problem.all_features),
        "chunk of logits": float(problem.loss),
    }
