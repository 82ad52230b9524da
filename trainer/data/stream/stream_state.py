"""The position in the data as a checkpoint keeps it, and whether a run may go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config.data_config import DataConfig
from trainer.data.randomness import ORDER_VERSION
from trainer.data.shards.manifest import Manifest
from trainer.data.stream.packing import LanePosition, LanePositions
from trainer.data.stream.step_plan import plan_step

STATE_VERSION = 1
_LANES = "lane_positions"


def data_state(
    config: DataConfig,
    manifests: Sequence[Manifest],
    step: int,
    lane_positions: Mapping[str, LanePositions] | None = None,
) -> dict[str, Any]:
    """The state after ``step`` applied updates, ready for JSON; under 1 KB a source, and some 20 bytes a packed lane.

    It says how the order was made; the position is one integer a source, and follows from ``step``. A packed source
    consumes as many samples as fit, so it has a position a lane (lane_positions, of all lanes).
    """
    sources: dict[str, dict[str, Any]] = {}
    for plan, manifest in zip(plan_step(config, 1), manifests, strict=True):
        sources[plan.source.name] = {
            "manifest_sha256": manifest.sha256,
            "samples": manifest.total_samples,
            "num_lanes": plan.lanes,
            "read_block": config.read_block,
            "shuffle_window": config.shuffle_window,
            "batch_size": plan.source.batch_size,
            "samples_per_row": plan.samples_per_row,
            "samples_consumed": step * plan.samples_per_step,
        }
        if plan.source.packing:
            del sources[plan.source.name]["samples_consumed"]
            sources[plan.source.name]["packed_to"] = plan.source.max_tokens
            lanes = (lane_positions or {}).get(plan.source.name, {})
            sources[plan.source.name][_LANES] = [lanes[lane].to_json() for lane in sorted(lanes)]
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
            names = tuple(dict.fromkeys((*new[name], *old[name])))
            problems += _differences(f"source {name!r}", old[name], new[name], [n for n in names if n != _LANES])
    if problems:
        raise ValueError(
            "the checkpoint's data do not match this run's, so it cannot continue exactly: "
            + "; ".join(problems)
            + ". Use the settings and manifests it was written with, or start a new run_dir"
        )


def saved_lane_positions(state: Mapping[str, Any]) -> dict[str, dict[int, LanePosition]]:
    """Where the packed sources' lanes stand, of a state that ``data_state`` made; empty of the state of a new run."""
    return {
        name: {lane: LanePosition.from_json(value) for lane, value in enumerate(source[_LANES])}
        for name, source in state.get("sources", {}).items()
        if _LANES in source
    }


def merge_lane_positions(ranks: Sequence[Mapping[str, LanePositions]]) -> dict[str, dict[int, LanePosition]]:
    """The positions of all lanes, from what each rank has of its own ones."""
    merged: dict[str, dict[int, LanePosition]] = {}
    for rank in ranks:
        for name, lanes in rank.items():
            merged.setdefault(name, {}).update(lanes)
    return merged


def _differences(where: str, old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"{where}: {name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]
