"""Count the activations of a run's micro-batches, and choose how many blocks are recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from model.activations import Activations, MicroBatch, count_activations
from model.factory import torch_dtype
from model.flamingo import Flamingo
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.stream.step_plan import SourcePlan
from trainer.deepspeed_engine.partitioned_linear import partitioned_linear
from trainer.planning.workload import largest_micro_batch
from trainer.runtime.torch_internals import torch_linear


class ActivationMemory:
    """Count what a micro-batch keeps for its backward, each shape once (``model.activations``).

    A count takes seconds.
    """

    def __init__(self, config: FlamingoRunConfig, model: Flamingo, *, interpolate: bool = False) -> None:
        """Count for the model of a run.

        Args:
            config: The run, for its dtype and ZeRO stage.
            model: The model on any device, the meta device too, or partitioned, but without DeepSpeed's engine.
            interpolate: Whether to count one row and two only, and extrapolate linearly. A search over micro-batches
                needs that.
        """
        self.model = model
        self._interpolate = interpolate
        self._dtype = torch_dtype(config.training.dtype)
        self._linear = partitioned_linear if config.deepspeed.zero_stage == 3 else torch_linear
        self._counted: dict[tuple[MicroBatch, int], Activations] = {}

    def count(self, batch: MicroBatch, recomputed: int) -> Activations:
        """Count the activations where the first ``recomputed`` blocks are recomputed."""
        if self._interpolate and batch.rows > 2:
            media = batch.media // batch.rows
            one, two = (self.count(replace(batch, rows=n, media=n * media), recomputed) for n in (1, 2))
            return _extrapolate(one, two, batch.rows)
        key = (batch, recomputed)
        if key not in self._counted:
            before = self.model.language_model.checkpointed
            self.model.set_activation_checkpointing(recomputed)
            self._counted[key] = count_activations(self.model, batch, self._dtype, self._linear)
            self.model.set_activation_checkpointing(before)
        return self._counted[key]

    def estimate(self, batch: MicroBatch, recomputed: int) -> Activations:
        """Estimate ``count`` from the counts for no recomputed block and for all.

        The peak is either at the start of the backward, with everything that the kept blocks saved, or in a recomputed
        block, after the blocks behind it are done.
        """
        blocks = self.model.language_model.num_blocks
        if recomputed in (0, blocks):
            return self.count(batch, recomputed)
        none, every = self.count(batch, 0), self.count(batch, blocks)
        kept = (*every.blocks[:recomputed], *none.blocks[recomputed:])
        saved = none.saved - sum(none.blocks) + sum(kept)
        return Activations(saved, max(saved + none.peak - none.saved, every.peak), kept, none.vision, none.head)


def _extrapolate(one: Activations, two: Activations, rows: int) -> Activations:
    """Extrapolate linearly from the activations of one row and of two."""

    def at(first: int, second: int) -> int:
        return first + (rows - 1) * (second - first)

    blocks = tuple(at(first, second) for first, second in zip(one.blocks, two.blocks, strict=True))
    vision, head = at(one.vision, two.vision), at(one.head, two.head)
    return Activations(at(one.saved, two.saved), at(one.peak, two.peak), blocks, vision, head)


def recomputed_blocks(config: FlamingoRunConfig, memory: ActivationMemory, plans: Iterable[SourcePlan]) -> int:
    """Return how many of the language model's first blocks are recomputed in the backward.

    That is ``training.activation_checkpointing``, or the fewest blocks with which the activations of every micro-batch
    fit into ``training.activation_memory_gib``.

    Raises:
        ValueError: The language model has fewer blocks, or the activations do not fit with all of them recomputed.
    """
    wanted, budget = config.training.activation_checkpointing, config.training.activation_memory_gib
    blocks = memory.model.language_model.num_blocks
    if budget is None:
        if wanted > blocks:
            raise ValueError(
                f"training.activation_checkpointing {wanted}: the language model has {blocks} blocks; set a number up "
                f"to {blocks}, or true for all"
            )
        return wanted if not isinstance(wanted, bool) else blocks if wanted else 0
    batches = [largest_micro_batch(plan) for plan in plans]
    most = budget * 2**30
    estimated = (number for number in range(blocks) if _peak(memory.estimate, batches, number) <= most)
    number = next(estimated, blocks)
    while number < blocks and _peak(memory.count, batches, number) > most:
        number += 1
    if (least := _peak(memory.count, batches, number)) > most:
        raise ValueError(
            f"training.activation_memory_gib {budget:g}: with every block recomputed, the activations of a micro-batch "
            f"still need {least / 2**30:.4g} GiB; raise it, or lower data.sources.*.micro_batch_size"
        )
    return number


def _peak(count: Callable[[MicroBatch, int], Activations], batches: Sequence[MicroBatch], recomputed: int) -> int:
    return max(count(batch, recomputed).peak for batch in batches)
