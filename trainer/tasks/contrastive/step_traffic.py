"""Count what a device sends in a contrastive step: parameters, gradients and features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.config.contrastive_config import ClipConfig
from trainer.config.run_config import ContrastiveRunConfig
from trainer.planning.peak_memory import DEFAULT_LIVE_PARAMETERS
from trainer.planning.traffic import NORM_MESSAGES, PERSISTENCE_THRESHOLD, whole_parameters_traffic
from trainer.tasks.contrastive.step_memory import Problem
from trainer.tasks.contrastive.towers import IMAGE_TOWER

_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class SentBytes:
    """Hold what a device sends in a step.

    Attributes:
        size: Bytes, where all collectives are rings.
        messages: Collectives.
    """

    size: float
    messages: int


def passes_over_parameters(micro_batches: Iterable[int]) -> float:
    """Return how often a step goes through all parameters.

    Args:
        micro_batches: Number of micro-batches of each problem. All but the first are run twice, and once backwards.
    """
    return float(sum(3 * number - 1 for number in micro_batches))


class TowerSizes:
    """Count the parameters of a pair of towers, which all train.

    Attributes:
        total: All parameters.
        image: Those of the image tower with its projection.
    """

    def __init__(self, towers: nn.Module) -> None:
        """Count the parameters; they may be on the meta device."""
        sizes = {name: math.prod(parameter.shape) for name, parameter in towers.named_parameters()}
        self._all = list(sizes.values())
        self.total = sum(self._all)
        self.image = sum(size for name, size in sizes.items() if name.startswith(IMAGE_TOWER))
        self._num_image = sum(name.startswith(IMAGE_TOWER) for name in sizes)

    def parameters_and_gradients(
        self, zero: Mapping[str, Any], ranks: int, itemsize: int, micro_batches: Sequence[int]
    ) -> SentBytes:
        """Return what ZeRO sends (see ``trainer.planning.traffic``).

        Where a micro-batch is run twice, ZeRO-3 gathers every parameter for each pass: it does not keep parameters for
        the backward, because forwards without a backward make its record of their order invalid.

        Args:
            zero: ``zero_optimization`` of DeepSpeed's json.
            ranks: Number of devices.
            itemsize: Bytes of a parameter.
            micro_batches: Micro-batches of a device in each problem.
        """
        share, count = (ranks - 1) / ranks, sum(micro_batches)
        if zero["stage"] < 3:
            whole = whole_parameters_traffic(self.total, zero, ranks, count)
            return SentBytes(itemsize * whole.elements, whole.messages)
        buckets = math.ceil(self.total / zero["reduce_bucket_size"])
        threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
        gathered = [size for size in self._all if size > threshold]
        passes = passes_over_parameters(micro_batches)
        if max(micro_batches) == 1:
            far = max(0, sum(gathered) - zero.get("stage3_max_reuse_distance", DEFAULT_LIVE_PARAMETERS) // 2)
            passes = count * (1 + far / max(1, sum(gathered)))
        elements = passes * sum(gathered) + count * self.total + (self.total - sum(gathered))
        messages = round(passes * len(gathered)) + count * buckets
        small = len(self._all) - len(gathered)
        return SentBytes(itemsize * share * elements, messages + small + NORM_MESSAGES)

    def clipping(self, config: ContrastiveRunConfig, ranks: int) -> SentBytes:
        """Return what clipping each tower by itself sends, where every norm is above its limit.

        Gradients, and the weights that adaptive clipping compares them with, are made whole in float32: by an
        all-reduce of each parameter, or by an all-gather where parameters are partitioned.
        """
        image, text = config.clip_towers.image, config.clip_towers.text
        if image == text == ClipConfig():
            return SentBytes(0.0, 0)
        partitioned = config.deepspeed.zero_stage == 3
        size, messages = 0, 0
        num_text = len(self._all) - self._num_image
        for clip, elements, number in ((image, self.image, self._num_image), (text, self.total - self.image, num_text)):
            passes = 1 + (clip.adaptive is not None) + (clip.norm is not None and not partitioned)
            size, messages = size + passes * elements, messages + passes * number
        return SentBytes(_FLOAT32 * (ranks - 1) / ranks * size * (1 if partitioned else 2), messages)


def features_sent(problems: Iterable[Problem], ranks: int, context_length: int | None, biased: bool) -> SentBytes:
    """Return what the loss sends: features and captions to all processes, and gradients of the features back.

    Args:
        problems: Problems of a step.
        ranks: Number of devices.
        context_length: Tokens of a caption where equal captions are left out; None where no caption is sent.
        biased: Whether the logits have a bias beside their scale.
    """
    size, messages = 0.0, 0
    for problem in problems:
        columns = 2 * _FLOAT32 * problem.all_features  # gathered, and their gradients
        captions = _INT64 * problem.columns * (context_length or 0)
        scalars = 2 * _FLOAT32 * (1 + biased)  # all-reduced
        size += (ranks - 1) / ranks * (columns + captions + scalars)
        messages += 4 + (context_length is not None) + 1 + biased
    return SentBytes(size, messages)
