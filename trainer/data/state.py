"""The position in the data as a checkpoint keeps it, and whether a run may go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config.schema import DataConfig
from trainer.data.manifest import Manifest
from trainer.data.order import ORDER_VERSION
from trainer.data.plan import plan_update

STATE_VERSION = 1


def data_state(config: DataConfig, manifests: Sequence[Manifest], step: int) -> dict[str, Any]:
    """The state after ``step`` applied updates, ready for JSON; under 1 KB a source.

    It says how the order was made; the position is one integer a source, and follows from ``step``.
    """
    sources = {}
    for plan, manifest in zip(plan_update(config, 1), manifests, strict=True):
        sources[plan.source.name] = {
            "manifest_sha256": manifest.sha256,
            "samples": manifest.total_samples,
            "lanes": plan.lanes,
            "block": config.block,
            "window": config.window,
            "batch_size": plan.source.batch_size,
            "samples_per_row": plan.samples_per_row,
            "samples_consumed": step * plan.samples_per_update,
        }
    return {"version": STATE_VERSION, "order_version": ORDER_VERSION, "seed": config.seed, "sources": sources}


def check_data_state(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compares a checkpoint's state with this run's at the same step.

    World size, workers, micro-batches and the weights of sources may have changed. Raises ValueError with every
    difference, both values and the setting.
    """
    problems = _differences("data state", saved, current, ("version", "order_version", "seed"))
    old, new = saved.get("sources", {}), current.get("sources", {})
    problems += [f"the source {name!r} is gone" for name in old if name not in new]
    problems += [f"the source {name!r} is new" for name in new if name not in old]
    for name in old:
        if name in new:
            problems += _differences(f"source {name!r}", old[name], new[name], tuple(new[name]))
    if problems:
        raise ValueError(
            "the checkpoint's data do not match this run's, so it cannot continue exactly: "
            + "; ".join(problems)
            + ". Use the settings and manifests it was written with, or start a new run_dir"
        )


def _differences(where: str, old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"{where}: {name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]
