"""Test ``trainer.benchmark rates`` on two processes, and the plan that follows from the rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.project.commands import ROOT
from trainer import plan
from trainer.benchmark import __main__ as benchmark
from trainer.benchmark.rates import measured_device
from trainer.benchmark.result_file import Measurement

DEBUG = ROOT / "configs" / "debug.yaml"


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def rates_of(world: Any) -> list[dict[str, Any]]:
    from trainer.benchmark import rates

    return [row.as_json() for row in rates.measure(world, "float32", repeats=3)]


def result(rows: list[dict[str, Any]], **head: Any) -> str:
    known = {"benchmark": "rates", "device": "cpu", "hardware": "", "versions": {}, "processes": 2, "dtype": "float32"}
    return json.dumps([known | head, *rows])


@pytest.mark.distributed
def test_the_plan_of_two_processes_follows_their_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, others = run_distributed(rates_of, 2)
    # Both processes report the slower one.
    assert rows == others
    assert all(row["value"] > 0 for row in rows)
    assert {row["case"] for row in rows} == {
        "blocks",
        "ZeRO-3",
        "dequantize",
        "optimizer",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "memory",
    }

    def planned(rows: list[dict[str, Any]]) -> dict[str, float]:
        file = tmp_path / "rates.json"
        file.write_text(result(rows))
        assert plan.main([str(DEBUG), "--devices-per-node", "2", "--rates", str(file)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {line[1]: float(line[-2]) for line in lines if line[0] == "step" and line[1] != "total"}

    def slower(case: str) -> list[dict[str, Any]]:
        return [row | {"value": row["value"] / (1e4 if row["case"] == case else 1)} for row in rows]

    found = planned(rows)
    for case, part in (("blocks", "compute"), ("optimizer", "optimizer")):
        # The plan prints seconds with three digits.
        assert planned(slower(case))[part] == pytest.approx(1e4 * found[part], rel=0.5, abs=6)
        assert planned(slower(case))["network"] == found["network"]


def test_messages_and_reduce_scatters_have_a_time_of_their_own(tmp_path: Path) -> None:
    """Two processes: a byte takes 10 ns to gather and 30 ns to reduce, and each message 2 ms before its first byte."""

    def row(case: str, measure: str, value: float) -> dict[str, Any]:
        return Measurement("rates", case, measure, "", value).as_json()

    small, large = 2**16, 2**24  # of all processes; each sends half
    rows = [
        row("blocks", "width 512", 1e9),
        row("optimizer", "AdamW under ZeRO-3", 1e9),
        row("memory", "per device", 1),
        row("dequantize", "int8", 4e8),
    ]
    rows += [row("ZeRO-3", "weights made whole", 5e8)]
    rows += [row("all_gather_into_tensor", f"{small} bytes", small / 2 / (0.002 + 10e-9 * small / 2))]
    rows += [row("all_gather_into_tensor", f"{large} bytes", 1e8)]
    rows += [row("reduce_scatter_tensor", f"{large} bytes", 1e8 / 3)]
    file = tmp_path / "rates.json"
    file.write_text(result(rows))
    device = measured_device(file, "float32", 2, 512)
    assert device.network == device.node_link == 1e8
    assert device.message_seconds == (pytest.approx(0.002), 0.0)
    assert device.scatter_ratio == pytest.approx(3)
    assert device.made_whole == 5e8
    assert device.dequantized == {"int8": 4e8}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"benchmark": "step"}, "a result of trainer.benchmark step, not of rates"),
        ({"dtype": "bfloat16"}, "training.dtype is float32; measure with --dtype float32"),
        ({"processes": 4}, "measured with 4 processes, and this run has 2"),
    ],
)
def test_rates_of_something_else_are_refused(
    head: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rates.json"
    file.write_text(result([], **head))
    assert plan.main([str(DEBUG), "--devices-per-node", "2", "--rates", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_a_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.json"
    file.write_text("[]")
    assert plan.main([str(DEBUG), "--devices-per-node", "1", "--rates", str(file)]) == 2
    assert "is not a file that trainer.benchmark --json wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--repeats", "2"], "a median needs 3 or more"), (["--json", "not/there/rates.json"], "there is no folder")],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["rates", *arguments]) == 2
    assert message in capsys.readouterr().err
