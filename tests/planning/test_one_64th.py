"""A 64th of the 80B, with its depth and settings, trains in a 64th of the memory of its GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.project.commands import ROOT
from trainer import plan
from trainer.benchmark import __main__ as benchmark

CONFIG = str(ROOT / "configs/benchmark/80b-one-64th.yaml")
DEVICE_BYTES = 80e9 / 64


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_64th_of_the_80b_trains_in_a_64th_of_80_gb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    result = tmp_path / "step.json"
    assert benchmark.main(["step", CONFIG, "--steps", "3", "--warmup", "1", "--json", str(result)]) == 0
    rows = {row["measure"]: row["value"] for row in json.loads(result.read_text())[1:]}
    assert rows["parameters"] == pytest.approx(79.0e9 / 64, rel=0.02)
    assert rows["trained parameters"] == pytest.approx(8.5e9 / 64, rel=0.02)
    # All weights and the optimizer's state lie on the host. On a CPU they count as memory of the device, but as much
    # between the steps as at the peak. So does the reduce bucket, which a GPU would have to hold.
    grown = 2**20 * (rows["peak memory of a device"] - rows["memory of a device between steps"])
    capsys.readouterr()
    plan.main([CONFIG, "--devices-per-node", "1", "--device", "h100"])
    lines = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.endswith("GiB")]
    planned = {name.partition("memory")[2].strip(): 2**30 * float(gib) for name, gib, _ in lines}
    names = ("gathered parameters", "saved activations", "temporaries")
    assert grown == pytest.approx(sum(planned[name] for name in names), rel=0.1)
    assert grown + planned["reduce bucket"] < DEVICE_BYTES
