"""Accumulate the gradient of contrastive problems over micro-batches and ranks, exactly.

The loss of a pair depends on all other pairs, so it cannot be computed for one micro-batch. Where there are several,
all but the first are run twice: without a graph, to get their features; then, when the gradient of the loss with
respect to the features is known, with a graph that carries it into the weights (GradCache, Gao et al. 2021). The first
one runs between these passes, and keeps its graph over the loss. Random states are replayed, so that dropout is the
same. Memory grows with the features of the step, not with its activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.config.contrastive_config import ContrastiveLossConfig
from trainer.data.batch import Batch
from trainer.deepspeed_engine.engine import Engine
from trainer.tasks.contrastive.losses import Features, solve, surrogate
from trainer.tasks.contrastive.towers import kept_statistics


@dataclass(frozen=True)
class ContrastiveStep:
    """Accumulate the gradient of a step.

    Attributes:
        loss: Settings of the loss.
        mask_duplicates: Whether equal captions are left out of each other's negatives.
        merged: Whether the batches of all sources are one problem; else each source is a problem of its own.
    """

    loss: ContrastiveLossConfig
    mask_duplicates: bool
    merged: bool

    def __call__(self, engine: Engine, batches: Sequence[Batch], factors: Mapping[str, float]) -> dict[str, Tensor]:
        """Run forward and backward of all micro-batches; return this rank's summed loss by source.

        Args:
            engine: Engine of the towers.
            batches: Micro-batches of this rank; the same number and sizes on each rank.
            factors: Factor of each source's loss in the gradient. Merged sources have the same.
        """
        problems = [list(batches)] if self.merged else list(_by_source(batches).values())
        summed: dict[str, Tensor] = {}
        for problem in problems:
            losses = self._solve(engine, problem, factors[problem[0].source], is_last=problem is problems[-1])
            for batch, loss in zip(problem, losses, strict=True):
                summed[batch.source] = summed[batch.source] + loss if batch.source in summed else loss
        return summed

    def _solve(self, engine: Engine, batches: Sequence[Batch], factor: float, *, is_last: bool) -> list[Tensor]:
        """Add the gradient of one problem; return the loss of each micro-batch."""
        world = engine.world
        first, rest = batches[0], batches[1:]
        features, states = _without_graph(engine, rest) if rest else ([], [])
        every = [_features(engine, first), *features]
        if rest:
            states.append(RandomState.now(world.device))
        captions = torch.cat([batch.input_ids for batch in batches]).to(world.device) if self.mask_duplicates else None
        sizes = [len(batch.input_ids) for batch in batches]
        solution = solve(_joined(every), captions, sizes, self.loss, world, factor * world.size)
        for number, gradients in enumerate(_split(solution.gradients, sizes)):
            ends = number == len(batches) - 1
            if number > 0:
                states[number - 1].restore()
                every[number] = _features(engine, batches[number])
            loss = surrogate(every[number], gradients, with_scale=ends)
            engine.backward(loss, is_last=is_last and ends)
        if rest:
            states[-1].restore()  # so that what follows does not draw the replayed numbers again
        return solution.losses


def _features(engine: Engine, batch: Batch) -> Features:
    return Features(*engine.forward(batch.to(engine.world.device).inputs))


def _by_source(batches: Sequence[Batch]) -> dict[str, list[Batch]]:
    grouped: dict[str, list[Batch]] = {}
    for batch in batches:
        grouped.setdefault(batch.source, []).append(batch)
    return grouped


def _without_graph(engine: Engine, batches: Sequence[Batch]) -> tuple[list[Features], list[RandomState]]:
    """Return the features of micro-batches without a graph, and the random state before each."""
    device = engine.world.device
    features, states = [], []
    with torch.no_grad(), kept_statistics(engine.module):
        for batch in batches:
            states.append(RandomState.now(device))
            features.append(_features(engine, batch))
    return features, states


def _joined(every: Sequence[Features]) -> Features:
    image_ND = torch.cat([part.image_ND.detach() for part in every])
    return replace(every[-1], image_ND=image_ND, text_ND=torch.cat([part.text_ND.detach() for part in every]))


def _split(gradients: Features, sizes: Sequence[int]) -> Iterator[Features]:
    parts = zip(gradients.image_ND.split(list(sizes)), gradients.text_ND.split(list(sizes)), strict=True)
    for image_BD, text_BD in parts:
        yield replace(gradients, image_ND=image_BD, text_ND=text_BD)


@dataclass(frozen=True)
class RandomState:
    """Hold the state of torch's generators of the CPU and of a GPU."""

    cpu: Tensor
    gpu: Tensor | None
    device: torch.device

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """Return the present state."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), gpu, device)

    def restore(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)
