"""Count what each device sends in a step under ZeRO.

The volumes follow ZeRO (arXiv:1910.02054), section 7, for several micro-batches, and are what DeepSpeed 0.19 was
measured to send (``tests/planning/test_plan.py``). Only the traffic of recomputed blocks, which are gathered once more,
and the number of messages of large gathers are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flamingo import Flamingo
from model.flops import UsefulFlops
from model.parameters import num_weights, trainable_parameters
from model.quantization import num_quantized
from model.standardized_convolutions import STANDARDIZED
from trainer.planning.peak_memory import DEFAULT_LIVE_PARAMETERS

PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default for stage3_param_persistence_threshold
_PREFETCHED = 50_000_000  # and for stage3_prefetch_bucket_size
_NUM_GROUPS = 2  # of the optimizer, with and without weight decay; stages 1 and 2 send each by itself
NORM_MESSAGES = 3  # whether the gradient is finite, its norm, and whether all ranks stepped


@dataclass(frozen=True)
class Traffic:
    """Hold what a device sends in a step.

    Attributes:
        elements: Numbers, where all collectives are rings.
        messages: Collectives.
        scattered: Those of ``elements`` that reduce-scatters send.
    """

    elements: float
    messages: int
    scattered: float = 0.0


def whole_parameters_traffic(trainable: int, zero: Mapping[str, Any], ranks: int, micro_batches: int) -> Traffic:
    """Return what each device sends in a step of stage 1 or 2, where every device holds all parameters.

    Stage 1 reduces gradients once a step and gathers the stepped parameters; stage 2 reduces at every micro-batch.

    Args:
        trainable: Parameters that train.
        zero: ``zero_optimization`` of DeepSpeed's json.
        ranks: Number of devices.
        micro_batches: Micro-batches of a device in a step.
    """
    reductions = 1 if zero["stage"] == 1 else micro_batches
    messages = _NUM_GROUPS * (reductions * math.ceil(trainable / zero["reduce_bucket_size"]) + 1) + NORM_MESSAGES
    return Traffic((ranks - 1) / ranks * trainable * (2 * reductions + 1), messages)


class ModelSizes:
    """Count the parameters of a model once, for many predictions.

    Attributes:
        total: Parameters of the model.
        held: Their bytes, divided by those of a trained parameter: less than ``total`` where some are quantized.
        trainable: Parameters that train.
        vision: Parameters of the vision tower.
        largest_block: Parameters of the largest frozen block, counted as ``held``.
        standardized: Weights of the tower that ``model.standardized_convolutions`` keeps.
        useful: Sizes that decide the useful work.
    """

    def __init__(self, model: Flamingo) -> None:
        """Count the parameters of a model, which may be on the meta device."""
        self.total = num_weights(model.parameters())
        self.trainable = num_weights(trainable_parameters(model).values())
        self._itemsize = next(p.element_size() for p in model.parameters() if p.requires_grad)
        self.held = sum(self._held(parameter) for parameter in model.parameters())
        self.vision = num_weights(model.vision_encoder.parameters())
        frozen = [block for block in model.blocks() if not any(p.requires_grad for p in block.parameters())]
        self.largest_block = max((sum(map(self._held, block.parameters())) for block in frozen), default=0.0)
        tower = [module for module in model.vision_encoder.modules() if isinstance(module, STANDARDIZED)]
        self.standardized = num_weights(module.weight for module in tower if not module.weight.requires_grad)
        self.useful = UsefulFlops.of(model)
        self._all = list(model.parameters())
        self._vision = list(model.vision_encoder.parameters())
        crossings = model.blocks_with_cross_attention()
        lm = model.language_model.lm
        table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        self._table, self._is_tied = table, table is head
        # ZeRO-3 gathers a block of any of these with one message.
        blocks = model.language_model.num_blocks + len(crossings) + len(model.resampler.layers)
        self._units = blocks + _longest_stack(model.vision_encoder)
        parts = [
            [part for part in (block, crossings.get(index)) if part is not None]
            for index, block in enumerate(model.language_model.decoder_blocks())
        ]
        self._blocks = [[list(part.parameters()) for part in block] for block in parts]
        self._quantized = [num_quantized(block) for block in model.language_model.decoder_blocks()]
        self._fetches = {
            together: _Fetches.of(model, parts, set(frozen) if together else set()) for together in (False, True)
        }

    def traffic(
        self,
        zero: Mapping[str, Any],
        ranks: int,
        micro_batches: int,
        recomputed: int = 0,
        replicated: bool = False,
        together: bool = False,
    ) -> Traffic:
        """Return what each device sends in a step.

        Stage 3 gathers every parameter above the persistence threshold for each forward, and again for each backward
        what was released in between. It gathers the other parameters, frozen ones included, once a step, each with a
        message of its own.

        Args:
            zero: ``zero_optimization`` of DeepSpeed's json.
            ranks: Number of devices.
            micro_batches: Micro-batches of a device in a step.
            recomputed: Number of the language model's first blocks that are recomputed.
            replicated: Whether frozen parameters are whole on every device, and so never gathered.
            together: Whether the parameters of a frozen block are gathered together.
        """
        if ranks == 1:
            return Traffic(0.0, 0)
        if zero["stage"] < 3:
            return whole_parameters_traffic(self.trainable, zero, ranks, micro_batches)
        share = (ranks - 1) / ranks
        buckets = math.ceil(self.trainable / zero["reduce_bucket_size"])
        threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
        gathered = self._above(threshold, _moved(self._all, replicated))
        persistent = (self.trainable if replicated else self.held) - gathered
        again = self._gathered_again(zero, threshold, replicated)
        if again:
            again += self.recomputed_again(recomputed, threshold, replicated, together)
        elements = share * (micro_batches * (gathered + again + self.trainable) + persistent)
        small = sum(parameter.numel() <= threshold for parameter in _moved(self._all, replicated))
        gathers = self._gathers(zero, gathered, again, self._fetches[together], recomputed)
        messages = micro_batches * (gathers + buckets) + small + NORM_MESSAGES
        return Traffic(elements, messages, share * micro_batches * self.trainable)

    def _gathers(
        self, zero: Mapping[str, Any], gathered: float, again: float, fetches: _Fetches, recomputed: int
    ) -> int:
        """Return the messages in which a micro-batch gathers what its forward and its backward need."""
        live = zero.get("stage3_max_live_parameters", DEFAULT_LIVE_PARAMETERS)
        ahead = min(zero.get("stage3_prefetch_bucket_size", _PREFETCHED), live)
        if ahead:  # what is gathered ahead shares a message with what is used
            return sum(min(self._units, math.ceil(elements / ahead)) for elements in (gathered, again))
        return fetches.total + (fetches.in_backward(recomputed) if again else 0)

    def dequantized(self, recomputed: int) -> int:
        """Return how many weights a micro-batch turns from codes into numbers, each as often as it does.

        Args:
            recomputed: Number of the language model's first blocks that are recomputed.
        """
        return 2 * sum(self._quantized) + sum(self._quantized[:recomputed])  # forward, backward, recomputation

    def _held(self, parameter: nn.Parameter) -> float:
        return parameter.numel() * parameter.element_size() / self._itemsize

    def _above(self, threshold: int, parameters: Iterable[nn.Parameter]) -> float:
        """Return how much of some parameters is gathered at each use: those of more than ``threshold`` numbers."""
        return sum(self._held(parameter) for parameter in parameters if parameter.numel() > threshold)

    def recomputed_again(
        self, recomputed: int, threshold: int = 0, replicated: bool = False, together: bool = False
    ) -> float:
        """Return how many parameters the backward gathers once more than without recomputation.

        A frozen block that is gathered together stays whole from its recomputation to its backward, so it costs none.

        Args:
            recomputed: Number of the language model's first blocks that are recomputed.
            threshold: Numbers of a parameter that is never released.
            replicated: As for ``traffic``.
            together: As for ``traffic``.
        """
        parts = (part for block in self._blocks[:recomputed] for part in block)
        return sum(
            self._above(threshold, _moved(part, replicated))
            for part in parts
            if not together or any(parameter.requires_grad for parameter in part)
        )

    def _gathered_again(self, zero: Mapping[str, Any], threshold: int, replicated: bool) -> float:
        """Return how many parameters the backward of a micro-batch gathers again, without recomputation."""
        behind_tower = self._above(threshold, self._all) - self._above(threshold, self._vision)
        reuse = zero.get("stage3_max_reuse_distance", DEFAULT_LIVE_PARAMETERS)
        # Between a block's forward and its backward, all parameters behind it are used twice.
        again = max(0.0, behind_tower - reuse // 2)
        if not again:
            return 0.0
        moved, moved_vision = _moved(self._all, replicated), _moved(self._vision, replicated)
        # Those that are not gathered pass the distance too.
        again *= (self._above(threshold, moved) - self._above(threshold, moved_vision)) / behind_tower
        if self._table.numel() > threshold and _moved([self._table], replicated):
            again += self._table.numel() * (3 if self._is_tied else 1)
        return again


def _moved(parameters: list[nn.Parameter], replicated: bool) -> list[nn.Parameter]:
    """Return the parameters that are gathered: those that train, or all."""
    return [parameter for parameter in parameters if parameter.requires_grad or not replicated]


@dataclass(frozen=True)
class _Fetches:
    """Count the modules that ZeRO-3 gathers with one message each where it gathers nothing ahead.

    Attributes:
        total: Of the model.
        vision: Of the vision tower, which has no backward.
        recomputed: Those that the recomputation of each of the language model's blocks gathers once more.
    """

    total: int
    vision: int
    recomputed: Sequence[int]

    @classmethod
    def of(cls, model: Flamingo, blocks: Sequence[Sequence[nn.Module]], together: Set[nn.Module]) -> _Fetches:
        """Count the modules of a model.

        Args:
            model: The model.
            blocks: Each block of the language model, and the cross-attention before it.
            together: Modules whose parameters are gathered together.
        """
        recomputed = [sum(_num_fetched(part, together) for part in parts if part not in together) for parts in blocks]
        return cls(_num_fetched(model, together), _num_fetched(model.vision_encoder, together), recomputed)

    def in_backward(self, recomputed: int) -> int:
        """Return the messages of a backward that recomputes so many blocks, if it gathers again."""
        return self.total - self.vision + sum(self.recomputed[:recomputed])


def _num_fetched(module: nn.Module, together: Set[nn.Module]) -> int:
    if module in together:
        return 1
    own = any(True for _ in module.parameters(recurse=False))
    return own + sum(_num_fetched(child, together) for child in module.children())


def _longest_stack(module: nn.Module) -> int:
    """Return the length of the longest list of modules in a module: the blocks of a vision tower."""
    stacks = (found for found in module.modules() if isinstance(found, nn.ModuleList | nn.Sequential))
    return max(map(len, stacks), default=0)
