"""Search the settings that change memory and speed, and never what is trained."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trainer.config.run_config import DeepSpeedConfig, FlamingoRunConfig
from trainer.planning.prediction import Cluster, Prediction

_MICRO_BATCHES = (1, 2, 4, 8, 16)  # of each source, for a process in a step
_OFFLOAD: tuple[Literal["none", "cpu"], ...] = ("none", "cpu")


def fitting_variants(
    config: FlamingoRunConfig, num_blocks: int, cluster: Cluster, predict: Callable[[FlamingoRunConfig], Prediction]
) -> Iterator[tuple[str, Prediction]]:
    """Yield the variants that fit into the devices' memory, each with the fewest recomputed blocks that suffice.

    Args:
        config: Run to vary.
        num_blocks: Blocks of its language model.
        cluster: Devices to run on.
        predict: Prediction of a configuration.

    Yields:
        Settings as on the command line, without the dashes, and their prediction.
    """
    for settings, variant in variants(config, cluster):

        def recomputing(number: int, variant: FlamingoRunConfig = variant) -> Prediction:
            training = replace(variant.training, activation_checkpointing=number, activation_memory_gib=None)
            return predict(replace(variant, training=training))

        def fits(number: int, recomputing: Callable[[int], Prediction] = recomputing) -> bool:
            return recomputing(number).fits

        if fits(num_blocks):
            number = 0 if fits(0) else bisect.bisect_left(range(num_blocks), True, lo=1, key=fits)
            value = {0: "false", num_blocks: "true"}.get(number, str(number))
            yield f"{settings}, training.activation_checkpointing {value}", recomputing(number)


def variants(config: FlamingoRunConfig, cluster: Cluster) -> Iterator[tuple[str, FlamingoRunConfig]]:
    """Yield settings and the configuration with them: micro-batches, offload and hpZ in every combination.

    Activation checkpointing stays as it is: how much it takes depends on the other settings.
    """
    groups = [1, cluster.devices_per_node] if cluster.nodes > 1 and cluster.devices_per_node > 1 else [1]
    for micro_batches, parameters, optimizer, group in itertools.product(_MICRO_BATCHES, _OFFLOAD, _OFFLOAD, groups):
        rows = [source.batch_size // cluster.size for source in config.data.sources]
        if any(count % micro_batches for count in rows):
            continue
        sources = tuple(
            replace(source, micro_batch_size=count // micro_batches)
            for source, count in zip(config.data.sources, rows, strict=True)
        )
        settings = [f"data.sources.{i}.micro_batch_size {source.micro_batch_size}" for i, source in enumerate(sources)]
        settings += [f"deepspeed.offload_param.device {parameters}", f"deepspeed.offload_optimizer.device {optimizer}"]
        if group > 1 or config.deepspeed.hpz_partition_size > 1:
            settings.append(f"deepspeed.hpz_partition_size {group}")
        deepspeed = _with_partitioning(config.deepspeed, parameters, optimizer, group)
        yield ", ".join(settings), replace(config, data=replace(config.data, sources=sources), deepspeed=deepspeed)


def _with_partitioning(
    settings: DeepSpeedConfig, parameters: Literal["none", "cpu"], optimizer: Literal["none", "cpu"], group: int
) -> DeepSpeedConfig:
    raw = settings.raw
    values: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8")) if isinstance(raw, Path) else dict(raw or {})
    zero = dict(values.get("zero_optimization", {}))
    for key in ("offload_param", "offload_optimizer", "zero_hpz_partition_size"):
        zero.pop(key, None)  # the raw JSON would contradict the settings that are tried
    return replace(
        settings,
        hpz_partition_size=group,
        raw=values | {"zero_optimization": zero},
        offload_param=replace(settings.offload_param, device=parameters),
        offload_optimizer=replace(settings.offload_optimizer, device=optimizer),
    )
