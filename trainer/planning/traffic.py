"""Count what each device sends in a step under ZeRO.

The volumes follow ZeRO (arXiv:1910.02054), section 7, for several micro-batches, and are what DeepSpeed 0.19 was
measured to send (``tests/planning/test_plan.py``). Only the traffic of recomputed blocks, which are gathered once more,
and the number of messages are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flamingo import Flamingo
from model.flops import UsefulFlops
from model.parameters import num_weights, trainable_parameters
from model.standardized_convolutions import STANDARDIZED
from trainer.planning.peak_memory import DEFAULT_LIVE_PARAMETERS

PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default for stage3_param_persistence_threshold


@dataclass(frozen=True)
class Traffic:
    """Hold what a device sends in a step.

    Attributes:
        elements: Numbers, where all collectives are rings.
        messages: Collectives.
    """

    elements: float
    messages: int


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
    messages = reductions * math.ceil(trainable / zero["reduce_bucket_size"]) + 1
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
        frozen = (block for block in model.blocks() if not any(p.requires_grad for p in block.parameters()))
        self.largest_block = max((sum(map(self._held, block.parameters())) for block in frozen), default=0.0)
        tower = [module for module in model.vision_encoder.modules() if isinstance(module, STANDARDIZED)]
        self.standardized = num_weights(module.weight for module in tower if not module.weight.requires_grad)
        self.useful = UsefulFlops.of(model)
        self._all = list(model.parameters())
        self._vision = list(model.vision_encoder.parameters())
        crossings = model.blocks_with_cross_attention()
        self._blocks = [
            [parameter for part in (block, crossings.get(index)) if part is not None for parameter in part.parameters()]
            for index, block in enumerate(model.language_model.decoder_blocks())
        ]
        lm = model.language_model.lm
        table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        self._table, self._is_tied = table, table is head
        # ZeRO-3 gathers a block of any of these with one message.
        blocks = len(self._blocks) + len(crossings) + len(model.resampler.layers)
        self._units = blocks + _longest_stack(model.vision_encoder)

    def traffic(
        self, zero: Mapping[str, Any], ranks: int, micro_batches: int, recomputed: int = 0, replicated: bool = False
    ) -> Traffic:
        """Return what each device sends in a step.

        Stage 3 gathers every parameter above the persistence threshold for each forward, and again for each backward
        what was released in between. It gathers the other parameters, frozen ones included, once a step.

        Args:
            zero: ``zero_optimization`` of DeepSpeed's json.
            ranks: Number of devices.
            micro_batches: Micro-batches of a device in a step.
            recomputed: Number of the language model's first blocks that are recomputed.
            replicated: Whether frozen parameters are whole on every device, and so never gathered.
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
        again = self._gathered_again(zero, threshold, recomputed, replicated)
        elements = share * (micro_batches * (gathered + again + self.trainable) + persistent)
        passes = 1 + again / gathered if gathered else 1
        return Traffic(elements, round(micro_batches * (passes * self._units + buckets)) + 1)

    def _held(self, parameter: nn.Parameter) -> float:
        return parameter.numel() * parameter.element_size() / self._itemsize

    def _above(self, threshold: int, parameters: Iterable[nn.Parameter]) -> float:
        """Return how much of some parameters is gathered at each use: those of more than ``threshold`` numbers."""
        return sum(self._held(parameter) for parameter in parameters if parameter.numel() > threshold)

    def _gathered_again(self, zero: Mapping[str, Any], threshold: int, recomputed: int, replicated: bool) -> float:
        """Return how many parameters the backward of a micro-batch gathers again."""
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
        return again + sum(self._above(threshold, _moved(block, replicated)) for block in self._blocks[:recomputed])


def _moved(parameters: list[nn.Parameter], replicated: bool) -> list[nn.Parameter]:
    """Return the parameters that are gathered: those that train, or all."""
    return [parameter for parameter in parameters if parameter.requires_grad or not replicated]


def _longest_stack(module: nn.Module) -> int:
    """Return the length of the longest list of modules in a module: the blocks of a vision tower."""
    stacks = (found for found in module.modules() if isinstance(found, nn.ModuleList | nn.Sequential))
    return max(map(len, stacks), default=0)
