"""Keep frozen weights whole on every process under ZeRO-3 (``frozen: replicated``), and train as if partitioned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launched import finish, kill_rank_1, wait_for_step
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses as run_losses
from tests.distributed.small_run import read_events, run_settings, write_settings
from tests.distributed.test_launcher import launch
from tests.distributed.test_trainable_parts import losses
from tests.model.builders import tiny_config

pytestmark = pytest.mark.distributed


def both_ways(world: Any) -> dict[str, dict[bool, list[float]]]:
    """Train with frozen weights partitioned and replicated, in float32 and in int8."""
    whole = tiny_config()
    configs = {
        "whole": whole,
        "int8": replace(whole, language_model=replace(whole.language_model, quantization="int8")),
    }
    return {
        name: {replicated: losses(world, config, "3", replicate_frozen=replicated) for replicated in (False, True)}
        for name, config in configs.items()
    }


def test_replicated_frozen_weights_train_as_partitioned_ones() -> None:
    for found in run_distributed(both_ways, 2):
        for name, by_place in found.items():
            assert by_place[True] == pytest.approx(by_place[False], rel=1e-5), name
            assert by_place[True][-1] < by_place[True][0]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_launched_run_with_replicas_equals_one_without_and_survives_a_kill(
    assets: Path, tmp_path: Path, port: int
) -> None:
    configs = {}
    for name, frozen in (("partitioned", "partitioned"), ("replicated", "replicated"), ("killed", "replicated")):
        settings = run_settings(assets, tmp_path / name, steps=6)
        settings["deepspeed"] |= {"frozen": frozen, "offload_param": {"device": "none"}}
        configs[name] = write_settings(tmp_path / f"{name}.yaml", settings)
    for name in ("partitioned", "replicated"):
        code, output = finish(launch(configs[name], port))
        assert code == 0, output
    assert run_losses(tmp_path / "replicated") == pytest.approx(run_losses(tmp_path / "partitioned"), rel=1e-5)

    launched = launch(configs["killed"], port)
    wait_for_step(launched, tmp_path / "killed", 3)
    kill_rank_1(launched)
    assert finish(launched)[0] != 0
    code, output = finish(launch(configs["killed"], port))
    assert code == 0, output
    assert read_events(tmp_path / "killed", "resumed")
    assert run_losses(tmp_path / "killed") == run_losses(tmp_path / "replicated"), "bit for bit"
    exports = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("killed", "replicated")]
    frozen = [(tmp_path / run / "export" / "frozen.json").read_text() for run in configs]
    assert exports[0] == exports[1]
    assert frozen[0] == frozen[1] == frozen[2]
