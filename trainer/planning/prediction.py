"""Memory, time and communication of an update, predicted from a configuration.

What ZeRO sends is what DeepSpeed 0.19 was measured to send (``tests/planning/test_plan.py``; for checkpointed blocks,
whose recomputation gathers once more, it is an estimate). Memory: ``trainer.planning.peak_memory``. Seconds follow from measured
rates, or from ``EFFICIENCY`` of the data sheet's FLOP/s: then they rank settings, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flamingo import Flamingo
from model.flops import UsefulFlops, Workload
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.stream.step_plan import SourcePlan, plan_step
from trainer.planning.cost_model import (
    ActivationMemory,
    Device,
    checkpointed_blocks,
    executed_flops,
    expected_media,
    micro_batch,
)
from trainer.planning.peak_memory import PeakMemory, Sizes, peak_memory

EFFICIENCY = 0.5  # of the dense peak: what well-fed matrix products of these sizes reach
_REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default for stage3_max_reuse_distance and stage3_max_live_parameters
_MASTER_AND_MOMENTS = 12  # bytes of an AdamW state in float32


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind."""

    device: Device
    nodes: int
    devices_per_node: int

    @property
    def size(self) -> int:
        """All devices."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Prediction:
    """seconds: of an update, by what they are spent on, which overlaps but for the optimizer. sent: bytes a device
    sends in an update. samples: of an update. recomputed: how many of the language model's first blocks the backward
    computes again."""

    parameters: int
    trainable: int
    memory: PeakMemory
    seconds: Mapping[str, float]
    sent: float
    samples: int
    device: Device
    recomputed: int

    @property
    def total_memory(self) -> float:
        """Of a device at the moment that needs most, bytes."""
        return sum(self.memory.parts.values())

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.total_memory <= self.device.memory

    @property
    def step_seconds(self) -> float:
        """The slowest of what overlaps, or all where nothing does, and the optimizer after it."""
        together = max if self.device.overlaps else sum
        return (
            together([self.seconds[name] for name in ("compute", "network", "host link")]) + self.seconds["optimizer"]
        )

    def days(self, samples: float) -> float:
        """To train on that many samples."""
        return samples / self.samples * self.step_seconds / 86_400


def predict(
    config: FlamingoRunConfig, model: Flamingo, cluster: Cluster, activations: ActivationMemory | None = None
) -> Prediction:
    """model: on the meta device, from ``cost_model.build_without_weights``. activations: counts made for the same model
    and type before, and ZeRO's stage.

    Raises: ValueError where the number of devices does not divide the batches, or the activations' budget is too small.
    """
    plans = plan_step(config.data, cluster.size)
    activations = activations or ActivationMemory(config, model)
    recomputed = checkpointed_blocks(config, activations, plans)
    micro_batches = sum(plan.micro_batches for plan in plans)
    zero = deepspeed_json(config, world_size=cluster.size, micro_batches_per_step=micro_batches)["zero_optimization"]
    width = 2 if config.training.dtype == "bfloat16" else 4
    trainable = _trainable(model)
    sent = width * sent_elements(model, zero, cluster.size, micro_batches, recomputed)
    return Prediction(
        _count(model.parameters()),
        trainable,
        _peak_memory(model, zero, cluster.size, width, plans, activations, recomputed),
        _seconds(config, model, plans, zero, cluster, width, sent, recomputed),
        sent,
        sum(source.batch_size for source in config.data.sources),
        cluster.device,
        recomputed,
    )


def sent_elements(
    model: Flamingo, zero: Mapping[str, Any], ranks: int, micro_batches: int, recomputed: int = 0
) -> float:
    """Numbers that each device sends in an update under ZeRO, all collectives being rings.

    Stage 1 reduces once an update and gathers what it updated; stage 2 reduces with every micro-batch. Stage 3 gathers
    all that is not persistent for each forward, and for each backward what is no longer held then; persistent ones,
    frozen or not, once an update. zero: the json's ``zero_optimization``. recomputed: blocks.
    """
    share = (ranks - 1) / ranks
    trainable = _trainable(model)
    if zero["stage"] < 3:
        reductions = 1 if zero["stage"] == 1 else micro_batches
        return share * trainable * (2 * reductions + 1)
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    persistent = _count(p for p in model.parameters() if p.numel() <= threshold)
    gathered = _count(model.parameters()) - persistent
    behind = gathered - _count(p for p in model.vision_encoder.parameters() if p.numel() > threshold)
    reuse = zero.get("stage3_max_reuse_distance", _REUSE_DISTANCE)
    # Between its forward and its backward, everything behind a block passes twice.
    again = max(0, behind - reuse // 2)
    lm = model.language_model.lm
    table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    if again and table.numel() > threshold:
        again += table.numel() * (3 if table is head else 1)
    if again:
        crossings = model.blocks_with_cross_attention()
        for index, block in enumerate(model.language_model.decoder_blocks()[:recomputed]):
            parts = [block, crossings[index]] if index in crossings else [block]
            again += _count(p for part in parts for p in part.parameters() if p.numel() > threshold)
    return share * (micro_batches * (gathered + again + trainable) + persistent)


def _peak_memory(
    model: Flamingo,
    zero: Mapping[str, Any],
    ranks: int,
    width: int,
    plans: Iterable[SourcePlan],
    activations: ActivationMemory,
    recomputed: int,
) -> PeakMemory:
    sizes = Sizes(
        _count(model.parameters()), _trainable(model), _count(model.vision_encoder.parameters()), width, ranks
    )
    micro_batches = [
        (plan.source.name, activations.estimate(micro_batch(plan), recomputed), plan.micro_batches) for plan in plans
    ]
    return peak_memory(sizes, zero, micro_batches)


def _seconds(
    config: FlamingoRunConfig,
    model: Flamingo,
    plans: tuple[SourcePlan, ...],
    zero: Mapping[str, Any],
    cluster: Cluster,
    width: int,
    sent: float,
    recomputed: int,
) -> dict[str, float]:
    sizes, device = UsefulFlops.of(model), cluster.device
    flops = sum(
        plan.micro_batches
        * plan.micro_batch_size
        * executed_flops(sizes, Workload(1, plan.source.max_tokens, *expected_media(plan.source)), recomputed)
        for plan in plans
    )
    trainable = _trainable(model)
    passes = (2 + recomputed / sizes.blocks) * sum(plan.micro_batches for plan in plans)
    from_host = 0.0
    if config.deepspeed.offload_param.device != "none":
        from_host += passes * width * _count(model.parameters()) / cluster.size
    if config.deepspeed.offload_optimizer.device != "none":
        from_host += (4 + width) * trainable / cluster.size
    link = device.node_link if cluster.nodes == 1 else device.network
    if cluster.nodes > 1 and zero.get("zero_hpz_partition_size", 1) > 1:
        sent /= 2  # the backward gathers within the node
    on_host = config.deepspeed.offload_optimizer.device != "none"
    state = (_MASTER_AND_MOMENTS + 4 + width) * trainable / cluster.size
    return {
        "compute": flops / (device.flops or EFFICIENCY * device.tflops * 1e12),
        "network": sent / link,
        "host link": from_host / device.host_link,
        # Bytes a second that a host, or a device, reads and writes.
        "optimizer": state / (20e9 if on_host else device.optimizer or 1e12),
    }


def _trainable(model: Flamingo) -> int:
    return _count(parameter for parameter in model.parameters() if parameter.requires_grad)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)
