"""Search the settings that change memory and speed, and never what is trained.

Settings come in groups: the ZeRO stage, hpZ, replicated frozen weights, and what is offloaded. Within a group the
micro-batches and the number of recomputed blocks vary. The best variant of each group is found, or the reason why none
fits.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from trainer.config.batch_sizes import batch_size_problems
from trainer.config.run_config import DeepSpeedConfig, FlamingoRunConfig, RunConfig
from trainer.planning.prediction import Cluster, Prediction

_MICRO_BATCHES = (1, 2, 4, 8, 16)  # of each source, for a process in a step
_STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
_OFFLOAD: tuple[Literal["none", "cpu"], ...] = ("none", "cpu")
_STATE_DEVICES = {"adamw": _OFFLOAD, "cpu_adam": _OFFLOAD[1:], "apex_fused_adam": _OFFLOAD[:1]}  # by optimizer.name

Run = TypeVar("Run", bound=RunConfig)


@dataclass(frozen=True)
class Variant(Generic[Run]):
    """Describe one combination of settings.

    Attributes:
        group: ZeRO stage, hpZ and offload, as a reader names them.
        settings: Values by the dotted name of the setting.
        config: The run with these settings.
    """

    group: str
    settings: Mapping[str, Any]
    config: Run


@dataclass(frozen=True)
class Found(Generic[Run]):
    """Hold the best variant of a group.

    Attributes:
        variant: The fastest variant that fits; where none does, the one that needs the least memory.
        prediction: Its prediction.
    """

    variant: Variant[Run]
    prediction: Prediction


def search(
    config: Run,
    num_blocks: int,
    cluster: Cluster,
    predict: Callable[[Run], Prediction],
    fastest_alone: bool = False,
) -> list[Found[Run]]:
    """Return the best variant of each group: first those that fit, the fastest one first.

    Args:
        config: Run to vary.
        num_blocks: Blocks of its language model, which can be recomputed; 0 for towers.
        cluster: Devices to run on.
        predict: Prediction of a configuration.
        fastest_alone: Whether to leave out groups that cannot hold the fastest variant.
    """
    groups: dict[str, list[tuple[float, Variant[Run]]]] = {}
    for variant in variants(config, cluster):
        # Recomputing takes time, so this is the least that the variant can take.
        groups.setdefault(variant.group, []).append((predict(_recomputing(variant, 0).config).step_seconds, variant))
    found: list[Found[Run]] = []
    for members in sorted(groups.values(), key=lambda group: min(seconds for seconds, _ in group)):
        fitting = [one.prediction.step_seconds for one in found if one.prediction.fits]
        if fastest_alone and fitting and min(seconds for seconds, _ in members) >= min(fitting):
            break
        found.append(_best(sorted(members, key=lambda member: member[0]), num_blocks, predict))
    return sorted(found, key=lambda one: (not one.prediction.fits, one.prediction.step_seconds))


def _best(
    members: Iterable[tuple[float, Variant[Run]]], num_blocks: int, predict: Callable[[Run], Prediction]
) -> Found[Run]:
    """Return the best variant of a group, whose members come with the fewest seconds that each can take, in order."""
    best: Found[Run] | None = None
    for least_seconds, variant in members:
        if best is not None and best.prediction.fits and best.prediction.step_seconds <= least_seconds:
            break
        found = _with_fewest_recomputed(variant, num_blocks, predict)
        if best is None or _rank(found.prediction) < _rank(best.prediction):
            best = found
    assert best is not None
    return best


def _rank(prediction: Prediction) -> tuple[bool, float]:
    return not prediction.fits, prediction.step_seconds if prediction.fits else prediction.device_memory


def _with_fewest_recomputed(variant: Variant[Run], num_blocks: int, predict: Callable[[Run], Prediction]) -> Found[Run]:
    """Return the variant with the fewest recomputed blocks that make it fit, or with all where that does not do."""

    def fits(number: int) -> bool:
        return predict(_recomputing(variant, number).config).fits

    number = 0 if fits(0) else num_blocks
    if number and fits(num_blocks):
        number = bisect.bisect_left(range(num_blocks), True, lo=1, key=fits)
    value = {num_blocks: True, 0: False}.get(number, number)
    chosen = _recomputing(variant, value)
    settings = {**variant.settings, "training.activation_checkpointing": value}
    return Found(replace(chosen, settings=settings), predict(chosen.config))


def _recomputing(variant: Variant[Run], number: bool | int) -> Variant[Run]:
    training = replace(variant.config.training, activation_checkpointing=number, activation_memory_gib=None)
    return replace(variant, config=replace(variant.config, training=training))


def variants(config: Run, cluster: Cluster) -> Iterator[Variant[Run]]:
    """Yield every combination of micro-batches, ZeRO stage, hpZ, replicated frozen weights and offload.

    Activation checkpointing stays as it is: how much it takes depends on the other settings. Stage 1 sums the gradients
    of bfloat16 weights in bfloat16, the other stages in float32, so it is no alternative to them.
    """
    frozen_before = config.deepspeed.frozen
    for deepspeed in _partitionings(config, cluster):
        changed = {} if deepspeed.frozen == frozen_before else {"deepspeed.frozen": deepspeed.frozen}
        for variant in _micro_batches(replace(config, deepspeed=deepspeed), cluster):
            yield replace(variant, settings={**variant.settings, **changed})


def _partitionings(config: RunConfig, cluster: Cluster) -> Iterator[DeepSpeedConfig]:
    """Yield every combination of ZeRO stage, hpZ, replicated frozen weights and offload."""
    stage, is_float32 = config.deepspeed.zero_stage, config.training.dtype == "float32"
    stages = [number for number in _STAGES if number == stage or is_float32 or (number > 1 and stage > 1)]
    partitions = [1, cluster.devices_per_node] if cluster.nodes > 1 and cluster.devices_per_node > 1 else [1]
    has_frozen = isinstance(config, FlamingoRunConfig)
    for number in stages:
        groups = partitions if number == 3 else [1]
        offload = _OFFLOAD if number == 3 else _OFFLOAD[:1]
        for group, parameters, optimizer in product(groups, offload, _STATE_DEVICES[config.optimizer.name]):
            found = _with_partitioning(config.deepspeed, number, parameters, optimizer, group)
            yield found
            if has_frozen and number == 3 and group == 1 and parameters == "none" and cluster.size > 1:
                yield replace(found, frozen="replicated")


def _micro_batches(config: Run, cluster: Cluster) -> Iterator[Variant[Run]]:
    """Yield the micro-batches that divide the batches of all sources, with the other settings of ``config``."""
    rows = [source.batch_size // cluster.size for source in config.data.sources]
    deepspeed = config.deepspeed
    offload = {"param": deepspeed.offload_param.device, "optimizer": deepspeed.offload_optimizer.device}
    fixed: dict[str, Any] = {
        "deepspeed.zero_stage": deepspeed.zero_stage,
        "deepspeed.hpz_partition_size": deepspeed.hpz_partition_size,
        **{f"deepspeed.offload_{name}.device": device for name, device in offload.items()},
    }
    if deepspeed.raw:
        fixed["deepspeed.raw"] = deepspeed.raw
    words = [f"stage {deepspeed.zero_stage}"]
    words += [f"hpZ {deepspeed.hpz_partition_size}"] * (deepspeed.hpz_partition_size > 1)
    words += ["frozen replicated"] * deepspeed.replicates_frozen
    words += [f"{name} offloaded" for name, device in offload.items() if device == "cpu"]
    for counts in product(_MICRO_BATCHES, repeat=len(rows)):
        if any(number % count for number, count in zip(rows, counts, strict=True)):
            continue
        sources = tuple(
            replace(source, micro_batch_size=number // count, micro_batch_tokens=None)
            for source, number, count in zip(config.data.sources, rows, counts, strict=True)
        )
        data = replace(config.data, sources=sources)
        if batch_size_problems(data, cluster.size):
            continue  # lanes divide the batch further than ranks do
        sizes = {f"data.sources.{i}.micro_batch_size": source.micro_batch_size for i, source in enumerate(sources)}
        replaced = [i for i, source in enumerate(config.data.sources) if source.micro_batch_tokens is not None]
        sizes |= {f"data.sources.{i}.micro_batch_tokens": None for i in replaced}
        yield Variant(", ".join(words), sizes | fixed, replace(config, data=data))


def _with_partitioning(
    settings: DeepSpeedConfig,
    stage: Literal[1, 2, 3],
    parameters: Literal["none", "cpu"],
    optimizer: Literal["none", "cpu"],
    group: int,
) -> DeepSpeedConfig:
    raw = settings.raw
    values: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8")) if isinstance(raw, Path) else dict(raw or {})
    zero = dict(values.get("zero_optimization", {}))
    for key in ("stage", "offload_param", "offload_optimizer", "zero_hpz_partition_size"):
        zero.pop(key, None)  # the raw JSON would contradict the settings that are tried
    if stage < 3:
        zero = {key: value for key, value in zero.items() if not key.startswith(("stage3_", "sub_group_size"))}
    return replace(
        settings,
        zero_stage=stage,
        hpz_partition_size=group,
        frozen=None,
        raw=values | {"zero_optimization": zero},
        offload_param=replace(settings.offload_param, device=parameters),
        offload_optimizer=replace(settings.offload_optimizer, device=optimizer),
    )
