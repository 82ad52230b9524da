"""Predict memory, time and communication of a step from a configuration.

The traffic of ZeRO is what DeepSpeed 0.19 was measured to send (``tests/planning/test_plan.py``). Only the traffic of
recomputed blocks, which are gathered once more, is an estimate. Seconds follow from measured rates, or from
``EFFICIENCY`` of the data sheet's FLOP/s; the latter only rank settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flamingo import Flamingo
from model.flops import UsefulFlops, Workload
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.stream.step_plan import SourcePlan, plan_step
from trainer.planning.activation_memory import ActivationMemory, recomputed_blocks
from trainer.planning.devices import Device
from trainer.planning.peak_memory import (
    ADAMW_STATE_BYTES,
    DEFAULT_LIVE_PARAMETERS,
    PeakMemory,
    Sizes,
    peak_memory,
)
from trainer.planning.workload import executed_flops, largest_micro_batch, most_media

EFFICIENCY = 0.5  # share of the dense peak that large matrix products reach; an assumption
_HOST_BYTES_PER_SECOND = 20e9  # memory that a host reads and writes in an optimizer step; an assumption
_DEVICE_BYTES_PER_SECOND = 1e12  # the same of an accelerator
_PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default for stage3_param_persistence_threshold
_GRADIENT_BYTES = 4  # float32


@dataclass(frozen=True)
class Cluster:
    """Describe the devices of a run, all of one kind.

    Attributes:
        device: The kind.
        nodes: Number of nodes.
        devices_per_node: Devices of each node.
    """

    device: Device
    nodes: int
    devices_per_node: int

    @property
    def size(self) -> int:
        """Number of all devices."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Prediction:
    """Hold the predictions of a step.

    Attributes:
        parameters: Parameters of the model.
        trainable: Parameters that train.
        memory: Memory of a device at the moment that needs most.
        seconds: Seconds of a step, by what they are spent on.
        sent: Bytes that a device sends in a step.
        samples: Samples of a step, over all devices.
        device: Kind of the devices.
        recomputed: Number of the language model's first blocks that the backward recomputes.
    """

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
        """Bytes of a device at the moment that needs most."""
        return sum(self.memory.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.total_memory <= self.device.memory

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: the slowest of what overlaps, or the sum where nothing overlaps, and the optimizer."""
        together = max if self.device.overlaps else sum
        return (
            together([self.seconds[name] for name in ("compute", "network", "host link")]) + self.seconds["optimizer"]
        )

    def days(self, samples: float) -> float:
        """Return the days that training on so many samples takes."""
        return samples / self.samples * self.step_seconds / 86_400


def predict(
    config: FlamingoRunConfig, model: Flamingo, cluster: Cluster, activations: ActivationMemory | None = None
) -> Prediction:
    """Predict a step of a run.

    Args:
        config: The run.
        model: Its model on the meta device (``random_weights.build_on_meta_device``).
        cluster: Devices to run on.
        activations: Earlier counts for the same model, dtype and ZeRO stage; None counts anew.

    Raises:
        ValueError: The batches cannot be divided among the devices, or the activations do not fit into their budget.
    """
    plans = plan_step(config.data, cluster.size)
    activations = activations or ActivationMemory(config, model)
    recomputed = recomputed_blocks(config, activations, plans)
    micro_batches = sum(plan.num_micro_batches for plan in plans)
    zero = deepspeed_json(config)["zero_optimization"]
    itemsize = 2 if config.training.dtype == "bfloat16" else 4
    sizes = Sizes(
        _count(model.parameters()),
        _count(parameter for parameter in model.parameters() if parameter.requires_grad),
        _count(model.vision_encoder.parameters()),
        itemsize,
        cluster.size,
    )
    sent = itemsize * sent_elements(model, zero, cluster.size, micro_batches, recomputed)
    counted = [
        (plan.source.name, activations.estimate(largest_micro_batch(plan), recomputed), plan.num_micro_batches)
        for plan in plans
    ]
    return Prediction(
        sizes.total,
        sizes.trainable,
        peak_memory(sizes, zero, counted),
        _seconds(config, model, plans, zero, cluster, sizes, sent, recomputed),
        sent,
        sum(source.batch_size for source in config.data.sources),
        cluster.device,
        recomputed,
    )


def sent_elements(
    model: Flamingo, zero: Mapping[str, Any], ranks: int, micro_batches: int, recomputed: int = 0
) -> float:
    """Return how many numbers each device sends in a step under ZeRO, where all collectives are rings.

    The volumes follow ZeRO (arXiv:1910.02054), section 7, for several micro-batches. Stage 1 reduces gradients once a
    step and gathers the stepped parameters; stage 2 reduces at every micro-batch. Stage 3 gathers every parameter above
    the persistence threshold for each forward, and again for each backward what was released in between. It gathers
    the other parameters, frozen ones included, once a step.

    Args:
        model: The model; its parameters may be on the meta device.
        zero: ``zero_optimization`` of DeepSpeed's json.
        ranks: Number of devices.
        micro_batches: Micro-batches of a device in a step.
        recomputed: Number of the language model's first blocks that are recomputed.
    """
    share = (ranks - 1) / ranks
    trainable = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
    if zero["stage"] < 3:
        reductions = 1 if zero["stage"] == 1 else micro_batches
        return share * trainable * (2 * reductions + 1)
    threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)
    persistent = _count(p for p in model.parameters() if p.numel() <= threshold)
    gathered = _count(model.parameters()) - persistent
    again = _gathered_again(model, zero, gathered, threshold, recomputed)
    return share * (micro_batches * (gathered + again + trainable) + persistent)


def _gathered_again(model: Flamingo, zero: Mapping[str, Any], gathered: int, threshold: int, recomputed: int) -> int:
    """Return how many parameters the backward of a micro-batch gathers again."""
    behind_tower = gathered - _count(p for p in model.vision_encoder.parameters() if p.numel() > threshold)
    reuse = zero.get("stage3_max_reuse_distance", DEFAULT_LIVE_PARAMETERS)
    # Between a block's forward and its backward, all parameters behind it are used twice.
    again = max(0, behind_tower - reuse // 2)
    if not again:
        return 0
    lm = model.language_model.lm
    table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    if table.numel() > threshold:
        again += table.numel() * (3 if table is head else 1)
    crossings = model.blocks_with_cross_attention()
    for index, block in enumerate(model.language_model.decoder_blocks()[:recomputed]):
        parts = [block, crossings[index]] if index in crossings else [block]
        again += _count(p for part in parts for p in part.parameters() if p.numel() > threshold)
    return again


def _seconds(
    config: FlamingoRunConfig,
    model: Flamingo,
    plans: Sequence[SourcePlan],
    zero: Mapping[str, Any],
    cluster: Cluster,
    sizes: Sizes,
    sent: float,
    recomputed: int,
) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on, as if nothing overlapped."""
    useful, device = UsefulFlops.of(model), cluster.device
    flops = sum(
        plan.num_micro_batches
        * plan.micro_batch_size
        * executed_flops(
            useful,
            Workload(1, plan.source.max_tokens, most_media(plan.source), plan.source.frames_in_medium),
            recomputed,
        )
        for plan in plans
    )
    passes = (2 + recomputed / useful.num_blocks) * sum(plan.num_micro_batches for plan in plans)
    from_host = 0.0
    if config.deepspeed.offload_param.device != "none":
        from_host += passes * sizes.itemsize * sizes.total / cluster.size
    optimizer_on_host = config.deepspeed.offload_optimizer.device != "none"
    if optimizer_on_host:
        from_host += (_GRADIENT_BYTES + sizes.itemsize) * sizes.trainable / cluster.size
    if cluster.nodes > 1 and zero.get("zero_hpz_partition_size", 1) > 1:
        sent /= 2  # the backward gathers within the node: ZeRO++ (arXiv:2306.10209), section 3.2
    state = (ADAMW_STATE_BYTES + _GRADIENT_BYTES + sizes.itemsize) * sizes.trainable / cluster.size
    return {
        "compute": flops / (device.flops or EFFICIENCY * device.tflops * 1e12),
        "network": sent / (device.node_link if cluster.nodes == 1 else device.network),
        "host link": from_host / device.host_link,
        "optimizer": state
        / (_HOST_BYTES_PER_SECOND if optimizer_on_host else device.optimizer or _DEVICE_BYTES_PER_SECOND),
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)
