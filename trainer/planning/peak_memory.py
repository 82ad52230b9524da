"""The most that a device holds at any moment of an update: what stays, and what the fullest moment adds.

Which tensors exist when is what DeepSpeed 0.19 was seen to allocate (``tests/planning/test_plan_memory.py``). What an
update adds is at its most when a micro-batch's loss is computed, when its backward begins (ZeRO-1 and 2 make their
reduce bucket then), when gradients are reduced at its end, or, under ZeRO-3, in the vision tower, while the
parameters behind it are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.activations import Activations

_REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default for stage3_max_live_parameters
_MASTER_AND_MOMENTS = 12  # bytes of an AdamW state in float32
_FLOAT32 = 4

Parts = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, the trained, those of the vision tower. width: bytes of one. ranks: devices."""

    total: int
    trainable: int
    vision: int
    width: int
    ranks: int


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a device, by what they are for, at the moment that needs most."""

    moment: str
    parts: Mapping[str, float]


def peak_memory(
    sizes: Sizes, zero: Mapping[str, Any], micro_batches: Sequence[tuple[str, Activations, int]]
) -> PeakMemory:
    """zero: the json's ``zero_optimization``. micro_batches: of an update, (source, activations, how many) in order."""
    moments = list(_moments(sizes, zero, micro_batches))
    name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return PeakMemory(name, _staying(sizes, zero) | parts)


def _staying(sizes: Sizes, zero: Mapping[str, Any]) -> Parts:
    """What exists between updates too."""
    partitioned, secondary = zero["stage"] == 3, zero.get("zero_hpz_partition_size", 1)
    held = 0.0 if _away(zero, "param") else sizes.width / (sizes.ranks if partitioned else 1)
    on_device = 0.0 if _away(zero, "optimizer") else 1 / sizes.ranks
    parts = {
        "frozen parameters": (sizes.total - sizes.trainable) * held,
        "trainable parameters": sizes.trainable * held,
        "optimizer": _MASTER_AND_MOMENTS * sizes.trainable * on_device,
    }
    if partitioned:
        parts["partition of the gradients"] = _FLOAT32 * sizes.trainable * on_device
        parts["reduce bucket"] = float(sizes.width * zero["reduce_bucket_size"])
    if secondary > 1:
        parts["node's second partition"] = sizes.width * sizes.total / secondary
    return parts


def _moments(
    sizes: Sizes, zero: Mapping[str, Any], micro_batches: Sequence[tuple[str, Activations, int]]
) -> Iterator[tuple[str, Parts]]:
    moments = _with_parameters_partitioned if zero["stage"] == 3 else _with_parameters_whole
    for number, (source, activations, count) in enumerate(micro_batches):
        # Of several alike, a later one finds gradients that the first does not.
        later = number > 0 or count > 1
        for moment, parts in moments(sizes, zero, activations, later):
            yield f"{moment} of {source}", parts


def _with_parameters_whole(
    sizes: Sizes, zero: Mapping[str, Any], activations: Activations, later: bool
) -> Iterator[tuple[str, Parts]]:
    """ZeRO-1 keeps whole gradients and its bucket until the step; ZeRO-2 a partition, and reduces every micro-batch."""
    first_stage = zero["stage"] == 1
    bucket = float(sizes.width * zero["reduce_bucket_size"])
    kept = float(sizes.width * sizes.trainable) if first_stage else _FLOAT32 * sizes.trainable / sizes.ranks
    copied = 0.0 if first_stage else float(sizes.width * min(sizes.trainable, zero["reduce_bucket_size"]))
    before = {"gradients": kept, "reduce bucket": bucket * first_stage} if later else {}
    yield "the loss", before | _at_the_loss(activations)
    at_backward = {"gradients": kept * later, "reduce bucket": bucket}
    yield "the backward", at_backward | {"saved activations": activations.saved}
    yield "the reduction", {"gradients": kept, "reduce bucket": bucket, "reduced copy": copied}


def _with_parameters_partitioned(
    sizes: Sizes, zero: Mapping[str, Any], activations: Activations, later: bool
) -> Iterator[tuple[str, Parts]]:
    """What is gathered lies there twice until it is used: as it came from the ranks, and put together. A single rank
    that has all of it gathers nothing."""
    most = zero.get("stage3_max_live_parameters", _REUSE_DISTANCE)
    gathers = sizes.ranks > 1 or _away(zero, "param")
    live, behind = (sizes.width * min(many, most) * gathers for many in (sizes.total, sizes.total - sizes.vision))
    in_flight = sizes.width * gathers * min(sizes.total, zero["stage3_prefetch_bucket_size"])
    gathered = {"gathered parameters": live, "gathered, to be put together": in_flight}
    yield "the vision tower", gathered | {"temporaries": activations.vision}
    yield "the loss", {"gathered parameters": behind, **_at_the_loss(activations)}
    reduced = sizes.width * min(sizes.trainable, zero["reduce_bucket_size"])
    converted = _FLOAT32 * sizes.trainable / sizes.ranks if sizes.width < _FLOAT32 else 0.0
    yield "the reduction", {"reduced copy": reduced + converted}


def _at_the_loss(activations: Activations) -> Parts:
    return {"saved activations": activations.saved, "temporaries": activations.peak - activations.saved}


def _away(zero: Mapping[str, Any], what: str) -> bool:
    return bool(zero.get(f"offload_{what}", {}).get("device", "none") != "none")
