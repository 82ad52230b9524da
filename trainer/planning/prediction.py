"""Predict memory, time and communication of a step from a configuration.

Seconds follow from measured rates, or from ``EFFICIENCY`` of the data sheet's FLOP/s; the latter only rank settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model.config import QuantizationMethod
from model.flamingo import Flamingo
from model.flops import Workload
from model.quantization import dequantize_bytes
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import FlamingoRunConfig, RunConfig
from trainer.data.stream.step_plan import SourcePlan, plan_step
from trainer.planning.activation_memory import ActivationMemory, recomputed_blocks
from trainer.planning.devices import Device
from trainer.planning.peak_memory import ADAMW_STATE_BYTES, PeakMemory, Sizes, host_memory, peak_memory
from trainer.planning.traffic import ModelSizes
from trainer.planning.workload import executed_flops, largest_micro_batch, most_media

EFFICIENCY = 0.5  # share of the dense peak that large matrix products reach; an assumption
_HOST_BYTES_PER_SECOND = 20e9  # memory that a host reads and writes in an optimizer step; an assumption
_DEVICE_BYTES_PER_SECOND = 1e12  # the same of an accelerator
_GRADIENT_BYTES = 4  # float32
_MEMORY_EFFICIENCY = 0.8  # share of the memory's rate that elementwise kernels reach; an assumption


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
        memory: Tensors on a device at the moment that needs most.
        host_memory: Bytes of a node's host memory, by their purpose.
        seconds: Seconds of a step, by what they are spent on.
        sent: Bytes that a device sends in a step.
        messages: Collectives of a step.
        samples: Samples of a step, over all devices.
        device: Kind of the devices.
        recomputed: Number of the language model's first blocks that the backward recomputes; None without one.
    """

    parameters: int
    trainable: int
    memory: PeakMemory
    host_memory: Mapping[str, float]
    seconds: Mapping[str, float]
    sent: float
    messages: int
    samples: int
    device: Device
    recomputed: int | None = None

    @property
    def total_memory(self) -> float:
        """Bytes of the tensors on a device at the moment that needs most."""
        return sum(self.memory.parts.values())

    @property
    def overhead(self) -> Mapping[str, float]:
        """Bytes of a device beside its tensors, by what takes them."""
        return {
            "CUDA context, NCCL, cuBLAS": self.device.reserved,
            "fragmentation": self.device.fragmentation * self.total_memory,
        }

    @property
    def device_memory(self) -> float:
        """Bytes of a device that the run takes."""
        return self.total_memory + sum(self.overhead.values())

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.device_memory <= self.device.memory

    @property
    def bound_by(self) -> str:
        """Name of what takes most of a step."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: the slowest of what overlaps, or the sum where nothing overlaps, and the optimizer."""
        together = max if self.device.overlaps else sum
        beside = (self.seconds.get(name, 0.0) for name in ("network", "host link", "drive"))
        return together([self.computing, *beside]) + self.seconds["optimizer"]

    @property
    def computing(self) -> float:
        """Seconds of forward and backward, with the time to turn codes into numbers."""
        return self.seconds["compute"] + self.seconds.get("dequantize", 0.0)

    def days(self, samples: float) -> float:
        """Return the days that training on so many samples takes."""
        return samples / self.samples * self.step_seconds / 86_400


def predict(
    config: FlamingoRunConfig,
    model: Flamingo,
    cluster: Cluster,
    activations: ActivationMemory | None = None,
    counted: ModelSizes | None = None,
) -> Prediction:
    """Predict a step of a run.

    Args:
        config: The run.
        model: Its model on the meta device (``random_weights.build_on_meta_device``).
        cluster: Devices to run on.
        activations: Earlier counts for the same model, dtype and ZeRO stage; None counts anew.
        counted: Earlier counts of the model's parameters; None counts anew.

    Raises:
        ValueError: The batches cannot be divided among the devices, or the activations do not fit into their budget.
    """
    plans = plan_step(config.data, cluster.size)
    activations = activations or ActivationMemory(config, model)
    counted = counted or ModelSizes(model)
    recomputed = recomputed_blocks(config, activations, plans)
    zero = deepspeed_json(config)["zero_optimization"]
    itemsize = 2 if config.training.dtype == "bfloat16" else 4
    parameters = (counted.held, counted.trainable, counted.vision)
    replicated = config.deepspeed.replicates_frozen
    sizes = Sizes(*parameters, itemsize, cluster.size, counted.largest_block, counted.standardized, replicated)
    num_micro_batches = sum(plan.num_micro_batches for plan in plans)
    # As ``deepspeed_engine.engine`` decides it.
    together = cluster.device.overlaps or config.deepspeed.offload_param.device == "nvme"
    traffic = counted.traffic(zero, cluster.size, num_micro_batches, recomputed, replicated, together)
    once_more = counted.recomputed_again(recomputed, together=together)
    micro_batches = [
        (plan.source.name, activations.estimate(largest_micro_batch(plan), recomputed), plan.num_micro_batches)
        for plan in plans
    ]
    work = Work(
        flops=_executed_flops(counted, plans, recomputed),
        streamed=num_micro_batches * (2 * counted.held + once_more),
        streamed_frozen=num_micro_batches * 2 * (counted.held - counted.trainable),
        sent=itemsize * traffic.elements,
        messages=traffic.messages,
        scattered=itemsize * traffic.scattered,
        made_whole=itemsize * num_micro_batches * counted.held * (zero["stage"] == 3),
        dequantized=num_micro_batches * counted.dequantized(recomputed),
        quantization=config.model.language_model.quantization,
    )
    return Prediction(
        counted.total,
        sizes.trainable,
        peak_memory(sizes, zero, micro_batches),
        host_memory(sizes, zero, cluster.devices_per_node),
        seconds_of_step(config, sizes, zero, cluster, work),
        work.sent,
        traffic.messages,
        sum(source.batch_size for source in config.data.sources),
        cluster.device,
        recomputed,
    )


def _executed_flops(counted: ModelSizes, plans: Sequence[SourcePlan], recomputed: int) -> float:
    """Return the operations of a device in a step."""
    return sum(
        plan.num_micro_batches
        * plan.micro_batch_size
        * executed_flops(
            counted.useful,
            Workload(1, plan.source.max_tokens, most_media(plan.source), plan.source.frames_in_medium),
            recomputed,
        )
        for plan in plans
    )


@dataclass(frozen=True)
class Work:
    """Hold what a device does in a step.

    Attributes:
        flops: Operations that it executes.
        streamed: Parameters that its forwards and backwards go through, counted each time.
        streamed_frozen: The frozen ones of them; a drive holds no others.
        sent: Bytes that it sends.
        messages: Collectives.
        scattered: Those of the bytes that reduce-scatters send.
        made_whole: Bytes of weights that ZeRO-3 makes whole.
        dequantized: Weights that it turns from codes into numbers, counted each time.
        quantization: How the weights are kept.
    """

    flops: float
    streamed: float
    sent: float
    messages: int
    streamed_frozen: float = 0.0
    scattered: float = 0.0
    made_whole: float = 0.0
    dequantized: float = 0.0
    quantization: Literal["none"] | QuantizationMethod = "none"

    def dequantize_seconds(self, device: Device, itemsize: int) -> dict[str, float]:
        """Return the seconds that a device takes to turn codes into numbers; empty without codes.

        Args:
            device: The device.
            itemsize: Bytes of a number.
        """
        if self.quantization == "none":
            return {}
        rate = _MEMORY_EFFICIENCY * device.memory_link / dequantize_bytes(self.quantization, itemsize)
        return {"dequantize": self.dequantized / device.dequantized.get(self.quantization, rate)}


def seconds_of_step(
    config: RunConfig, sizes: Sizes, zero: Mapping[str, Any], cluster: Cluster, work: Work
) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on, as if nothing overlapped."""
    device, itemsize = cluster.device, sizes.itemsize
    from_host = 0.0
    if config.deepspeed.offload_param.device != "none":
        from_host += itemsize * work.streamed / cluster.size
    # All devices of a node read their partitions from its drives.
    on_drive = config.deepspeed.offload_param.device == "nvme"
    from_drive = {"drive": itemsize * work.streamed_frozen / cluster.nodes / device.drive} if on_drive else {}
    optimizer_on_host = config.deepspeed.offload_optimizer.device != "none"
    if optimizer_on_host:
        from_host += (_GRADIENT_BYTES + itemsize) * sizes.trainable / cluster.size
    sent = work.sent + (device.scatter_ratio - 1) * work.scattered
    if cluster.nodes > 1 and zero.get("zero_hpz_partition_size", 1) > 1:
        sent /= 2  # the backward gathers within the node: ZeRO++ (arXiv:2306.10209), section 3.2
    start, hop = device.message_seconds
    state = (ADAMW_STATE_BYTES + _GRADIENT_BYTES + itemsize) * sizes.trainable / cluster.size
    return {
        "compute": work.flops / (device.flops or EFFICIENCY * device.tflops * 1e12)
        + (work.made_whole / device.made_whole if device.made_whole else 0.0),
        **work.dequantize_seconds(device, itemsize),
        "network": sent / (device.node_link if cluster.nodes == 1 else device.network)
        + work.messages * (start + hop * cluster.size),
        "host link": from_host / device.host_link,
        **from_drive,
        "optimizer": state
        / (_HOST_BYTES_PER_SECOND if optimizer_on_host else device.optimizer or _DEVICE_BYTES_PER_SECOND)
        + _swapped(config, sizes, cluster) / device.drive,
    }


def _swapped(config: RunConfig, sizes: Sizes, cluster: Cluster) -> float:
    """Return the bytes of the optimizer's state that a node reads from its drives and writes to them in a step."""
    on_drive = config.deepspeed.offload_optimizer.device == "nvme"
    return 2 * ADAMW_STATE_BYTES * sizes.trainable / cluster.nodes if on_drive else 0.0
