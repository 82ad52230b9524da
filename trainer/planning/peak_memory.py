"""Predict the most memory that a device holds at any moment of a step.

Some tensors stay (parameters, optimizer state, buckets); others exist only at some moments. A step needs most memory
at one of these: when a micro-batch's loss is computed; when its backward begins (ZeRO-1 and 2 allocate their reduce
bucket then); when its gradients are reduced; or, under ZeRO-3, in the vision tower, while the parameters behind it are
gathered, or in the last block, while the pieces of the parameters that were gathered last still exist. DeepSpeed 0.19
was observed to allocate these tensors (``tests/planning/test_peak_memory.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.activations import Activations

# DeepSpeed's default for stage3_max_live_parameters and stage3_max_reuse_distance (deepspeed/runtime/zero/config.py).
DEFAULT_LIVE_PARAMETERS = 1_000_000_000
# Bytes of AdamW's float32 weight and two moments per trained parameter: K in ZeRO (arXiv:1910.02054), section 3.1.
ADAMW_STATE_BYTES = 12
_FLOAT32 = 4

Parts = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """Describe a partitioned model.

    Attributes:
        total: Parameters of the model; a quantized one counts by its bytes.
        trainable: Parameters that train.
        vision: Parameters of the vision tower.
        itemsize: Bytes of one parameter.
        ranks: Devices among which the model is partitioned.
        largest_block: Parameters of the largest frozen block, which a GPU gathers together.
        standardized: Weights of a frozen NFNet that are kept standardized, whole on every device.
        replicated: Whether frozen parameters are whole on every device (``deepspeed.frozen: replicated``).
    """

    total: float
    trainable: int
    vision: int
    itemsize: int
    ranks: int
    largest_block: float = 0
    standardized: int = 0
    replicated: bool = False

    @property
    def gathered(self) -> float:
        """Parameters that ZeRO-3 gathers."""
        return self.trainable if self.replicated else self.total


@dataclass(frozen=True)
class PeakMemory:
    """Describe the memory of a device at the moment that needs most.

    Attributes:
        moment: Name of the moment.
        parts: Bytes by their purpose.
    """

    moment: str
    parts: Mapping[str, float]


def peak_memory(
    sizes: Sizes, zero: Mapping[str, Any], micro_batches: Sequence[tuple[str, Activations, int]]
) -> PeakMemory:
    """Return the memory at the moment that needs most.

    Args:
        sizes: Sizes of the model.
        zero: ``zero_optimization`` of DeepSpeed's json.
        micro_batches: Source, activations and number of the micro-batches of a step, in their order.
    """
    moments = list(_moments(sizes, zero, micro_batches))
    name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return PeakMemory(name, permanent_parts(sizes, zero) | parts)


def permanent_parts(sizes: Sizes, zero: Mapping[str, Any]) -> Parts:
    """Return what also exists between steps (ZeRO, section 3; ZeRO++, arXiv:2306.10209, for the second partition)."""
    partitioned, secondary = zero["stage"] == 3, zero.get("zero_hpz_partition_size", 1)
    held = 0.0 if _offloads(zero, "param") else sizes.itemsize / (sizes.ranks if partitioned else 1)
    on_device = 0.0 if _offloads(zero, "optimizer") else 1 / sizes.ranks
    parts = {
        "frozen parameters": (sizes.total - sizes.trainable) * (sizes.itemsize if sizes.replicated else held),
        "trainable parameters": sizes.trainable * held,
        "optimizer": ADAMW_STATE_BYTES * sizes.trainable * on_device,
    }
    if partitioned:
        parts["partition of the gradients"] = _FLOAT32 * sizes.trainable * on_device
        parts["reduce bucket"] = float(sizes.itemsize * zero["reduce_bucket_size"])
    if sizes.standardized:
        parts["standardized weights"] = float(sizes.itemsize * sizes.standardized)
    if secondary > 1:
        parts["node's second partition"] = sizes.itemsize * sizes.total / secondary
    return parts


def host_memory(sizes: Sizes, zero: Mapping[str, Any], devices_per_node: int) -> Parts:
    """Return the bytes of a node's host memory that offloaded tensors take.

    An offloaded optimizer keeps its gradients on the host too. Loader processes and the page cache come on top.
    """
    share = devices_per_node / sizes.ranks
    # A drive holds the frozen parameters; those that train stay on the host.
    on_host = {"cpu": sizes.total, "nvme": sizes.trainable}.get(_offload_device(zero, "param"), 0.0)
    steps_on_host = _offload_device(zero, "optimizer") == "cpu"
    return {
        "offloaded parameters": sizes.itemsize * on_host * share,
        "offloaded optimizer": (ADAMW_STATE_BYTES + _FLOAT32) * sizes.trainable * share * steps_on_host,
    }


def _moments(
    sizes: Sizes, zero: Mapping[str, Any], micro_batches: Sequence[tuple[str, Activations, int]]
) -> Iterator[tuple[str, Parts]]:
    for number, (source, activations, count) in enumerate(micro_batches):
        # Every micro-batch but the first of the step finds gradients of an earlier one.
        after_another = number > 0 or count > 1
        for moment, parts in moments_of_micro_batch(sizes, zero, activations, after_another):
            yield f"{moment} of {source}", parts


def moments_of_micro_batch(
    sizes: Sizes, zero: Mapping[str, Any], activations: Activations, after_another: bool
) -> Iterator[tuple[str, Parts]]:
    """Yield the moments of a micro-batch, and what exists at each beside the permanent tensors.

    Args:
        sizes: Sizes of the model.
        zero: ``zero_optimization`` of DeepSpeed's json.
        activations: Memory of the micro-batch.
        after_another: Whether an earlier micro-batch of the step has left gradients.
    """
    moments = _moments_of_zero_3 if zero["stage"] == 3 else _moments_of_zero_1_and_2
    yield from moments(sizes, zero, activations, after_another)


def between_micro_batches(sizes: Sizes, zero: Mapping[str, Any]) -> Parts:
    """Return what the micro-batches of a step leave for the next one; under ZeRO-3 all of it is permanent.

    ZeRO-1 keeps whole gradients and its bucket until the step, ZeRO-2 a partition of the gradients.
    """
    if zero["stage"] == 3:
        return {}
    if zero["stage"] == 1:
        bucket = float(sizes.itemsize * zero["reduce_bucket_size"])
        return {"gradients": float(sizes.itemsize * sizes.trainable), "reduce bucket": bucket}
    return {"gradients": _FLOAT32 * sizes.trainable / sizes.ranks}


def _moments_of_zero_1_and_2(
    sizes: Sizes, zero: Mapping[str, Any], activations: Activations, after_another: bool
) -> Iterator[tuple[str, Parts]]:
    """Yield what exists beside the permanent tensors; ZeRO-2 reduces gradients at every micro-batch."""
    bucket = float(sizes.itemsize * zero["reduce_bucket_size"])
    left = between_micro_batches(sizes, zero)
    kept = left["gradients"]
    copied = 0.0 if zero["stage"] == 1 else float(sizes.itemsize * min(sizes.trainable, zero["reduce_bucket_size"]))
    yield "the loss", (left if after_another else {}) | _at_the_loss(activations)
    at_backward = {"gradients": kept * after_another, "reduce bucket": bucket}
    yield "the backward", at_backward | {"saved activations": activations.saved}
    yield "the reduction", {"gradients": kept, "reduce bucket": bucket, "reduced copy": copied}


def _moments_of_zero_3(
    sizes: Sizes, zero: Mapping[str, Any], activations: Activations, after_another: bool
) -> Iterator[tuple[str, Parts]]:
    """Yield what exists beside the permanent tensors.

    A gathered parameter exists twice until all that were gathered with it are used: as the pieces of the ranks, and
    assembled. A single rank that holds all parameters on its device gathers nothing.
    """
    most = zero.get("stage3_max_live_parameters", DEFAULT_LIVE_PARAMETERS)
    gathers = sizes.ranks > 1 or _offloads(zero, "param")
    behind_tower = sizes.trainable if sizes.replicated else sizes.total - sizes.vision
    live, behind = (sizes.itemsize * min(many, most) * gathers for many in (sizes.gathered, behind_tower))
    together = max(zero["stage3_prefetch_bucket_size"], 0 if sizes.replicated else sizes.largest_block)
    in_flight = sizes.itemsize * gathers * min(sizes.gathered, together)
    gathered = {"gathered parameters": live, "gathered, in pieces": in_flight}
    yield "the vision tower", gathered | {"temporaries": activations.vision}
    last = {"gathered parameters": behind, "gathered, in pieces": min(in_flight, behind)}
    yield "the last block", last | {"saved activations": activations.saved - activations.head}
    yield "the loss", {"gathered parameters": behind, **_at_the_loss(activations)}
    reduced = sizes.itemsize * min(sizes.trainable, zero["reduce_bucket_size"])
    converted = _FLOAT32 * sizes.trainable / sizes.ranks if sizes.itemsize < _FLOAT32 else 0.0
    yield "the reduction", {"reduced copy": reduced + converted}


def _at_the_loss(activations: Activations) -> Parts:
    return {"saved activations": activations.saved, "temporaries": activations.peak - activations.saved}


def _offloads(zero: Mapping[str, Any], what: str) -> bool:
    return _offload_device(zero, what) != "none"


def _offload_device(zero: Mapping[str, Any], what: str) -> str:
    return str(zero.get(f"offload_{what}", {}).get("device", "none"))
