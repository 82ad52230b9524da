"""Memory, time and communication of an update, predicted from a configuration.

What ZeRO sends is what DeepSpeed 0.19 was measured to send (``tests/benchmarks/test_plan.py``; for checkpointed blocks,
whose recomputation gathers once more, it is an estimate). Partitioned states are exact but for padding. Activations are
an estimate from the sizes of what a block keeps, and seconds assume ``EFFICIENCY`` of the data sheet's FLOP/s: they
rank settings, and have to be replaced by ``trainer.benchmark step`` where there is a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flamingo import Flamingo
from model.flops import UsefulFlops, Workload
from trainer.config.deepspeed import deepspeed_json
from trainer.config.schema import FlamingoRunConfig
from trainer.cost_model import Device, executed_flops, expected_media
from trainer.data.plan import SourcePlan, plan_update

EFFICIENCY = 0.5  # of the dense peak: what well-fed matrix products of these sizes reach
_REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default for stage3_max_reuse_distance and stage3_max_live_parameters
_LOSS_BUFFERS = 3 * 64 * 2**20  # model.loss: a chunk of float32 logits, its type's copy and the gradient
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
    """memory: bytes of a device, by what they are for. seconds: of an update, by what they are spent on, which overlaps
    but for the optimiser. sent: bytes a device sends in an update. samples: of an update."""

    parameters: int
    trainable: int
    memory: Mapping[str, float]
    seconds: Mapping[str, float]
    sent: float
    samples: int
    device: Device

    @property
    def total_memory(self) -> float:
        """Of a device, bytes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.total_memory <= self.device.memory

    @property
    def update_seconds(self) -> float:
        """The slowest of what overlaps, and the optimiser after it."""
        return max(self.seconds[name] for name in ("compute", "network", "host link")) + self.seconds["optimiser"]

    def days(self, samples: float) -> float:
        """To train on that many samples."""
        return samples / self.samples * self.update_seconds / 86_400


def predict(config: FlamingoRunConfig, model: Flamingo, cluster: Cluster) -> Prediction:
    """model: on the meta device, from ``cost_model.build_without_weights``.

    Raises: ValueError where the number of devices does not divide the batches.
    """
    plans = plan_update(config.data, cluster.size)
    micro_batches = sum(plan.micro_batches for plan in plans)
    zero = deepspeed_json(config, world_size=cluster.size, micro_batches_per_update=micro_batches)["zero_optimization"]
    width = 2 if config.training.dtype == "bfloat16" else 4
    trainable = _count(p for p in model.parameters() if p.requires_grad)
    sent = width * sent_elements(model, zero, cluster.size, micro_batches, config.training.activation_checkpointing)
    return Prediction(
        _count(model.parameters()),
        trainable,
        _memory(config, model, plans, zero, cluster, width),
        _seconds(config, model, plans, zero, cluster, width, sent),
        sent,
        sum(source.batch_size for source in config.data.sources),
        cluster.device,
    )


def sent_elements(
    model: Flamingo, zero: Mapping[str, Any], ranks: int, micro_batches: int, checkpointing: bool = False
) -> float:
    """Numbers that each device sends in an update under ZeRO, all collectives being rings.

    Stage 1 reduces once an update and gathers what it updated; stage 2 reduces with every micro-batch. Stage 3 gathers
    all that is not persistent for each forward, and for each backward what is no longer held then; persistent ones,
    frozen or not, once an update. zero: the json's ``zero_optimization``.
    """
    share = (ranks - 1) / ranks
    trainable = _count(p for p in model.parameters() if p.requires_grad)
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
    if again and checkpointing:
        blocks = (model.language_model.decoder_blocks(), model.cross_attention)
        again += _count(p for part in blocks for p in part.parameters() if p.numel() > threshold)
    return share * (micro_batches * (gathered + again + trainable) + persistent)


def _memory(
    config: FlamingoRunConfig,
    model: Flamingo,
    plans: tuple[SourcePlan, ...],
    zero: Mapping[str, Any],
    cluster: Cluster,
    width: int,
) -> dict[str, float]:
    ranks, stage = cluster.size, zero["stage"]
    total = _count(model.parameters())
    trainable = _count(p for p in model.parameters() if p.requires_grad)
    parameters_away = config.deepspeed.offload_param.device != "none"
    optimiser_away = config.deepspeed.offload_optimizer.device != "none"
    per_rank = 1 / ranks if stage == 3 else 1.0
    held = 0.0 if parameters_away else width * per_rank
    live = min(total, zero.get("stage3_max_live_parameters", _REUSE_DISTANCE)) if stage == 3 else 0
    secondary = zero.get("zero_hpz_partition_size", 1)
    return {
        "frozen parameters": (total - trainable) * held,
        "trainable parameters": trainable * held,
        "gathered parameters": float(width * live),
        "node's second partition": width * total / secondary if secondary > 1 else 0.0,
        "gradients": 0.0 if optimiser_away else 4 * trainable / (ranks if stage > 1 else 1),
        "optimiser": 0.0 if optimiser_away else _MASTER_AND_MOMENTS * trainable / ranks,
        "activations": max(_activations(model, plan, config, width) for plan in plans),
        "buffers": float(_LOSS_BUFFERS + width * zero.get("reduce_bucket_size", 500_000_000)),
    }


def _activations(model: Flamingo, plan: SourcePlan, config: FlamingoRunConfig, width: int) -> float:
    """What the backward of one micro-batch keeps, and the largest thing that exists besides."""
    text = model.language_model.lm.config.get_text_config()
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    tokens = plan.micro_batch_size * plan.source.max_tokens
    media, frames = expected_media(plan.source)
    media = max(1, media * plan.micro_batch_size)
    # A frozen block keeps what its norms, attention and gated feed-forward need; a trained one its inputs as well.
    block = tokens * (8 * hidden + 4 * inner) * width
    sizes = model.config.cross_attention
    cross = tokens * (6 * hidden + 3 * sizes.feed_forward_multiplier * hidden) * width
    blocks, crossings = model.language_model.blocks, len(model.cross_attention)
    if config.training.activation_checkpointing:
        text_bytes = (blocks * tokens * hidden) * width + block + cross
    else:
        text_bytes = blocks * block + crossings * cross
    resampler = model.resampler
    features = media * frames * model.vision_encoder.features
    attention = model.config.resampler.heads * model.config.resampler.head_width
    layer = features * (2 * resampler.width + 2 * attention) + media * model.config.resampler.latents * (
        (6 + 3 * model.config.resampler.feed_forward_multiplier) * resampler.width
    )
    tower = features * model.vision_encoder.width * 8  # a block's worth: no graph is kept
    return float(text_bytes + width * (len(resampler.layers) * layer + tower))


def _seconds(
    config: FlamingoRunConfig,
    model: Flamingo,
    plans: tuple[SourcePlan, ...],
    zero: Mapping[str, Any],
    cluster: Cluster,
    width: int,
    sent: float,
) -> dict[str, float]:
    sizes, device = UsefulFlops.of(model), cluster.device
    checkpointing = config.training.activation_checkpointing
    flops = sum(
        plan.micro_batches
        * plan.micro_batch_size
        * executed_flops(sizes, Workload(1, plan.source.max_tokens, *expected_media(plan.source)), checkpointing)
        for plan in plans
    )
    trainable = _count(p for p in model.parameters() if p.requires_grad)
    passes = (3 if checkpointing else 2) * sum(plan.micro_batches for plan in plans)
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
        "compute": flops / (EFFICIENCY * device.tflops * 1e12),
        "network": sent / link,
        "host link": from_host / device.host_link,
        "optimiser": state / (20e9 if on_host else 1e12),  # bytes a second that a host, or a device, reads and writes
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)
