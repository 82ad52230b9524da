"""Test the plan against two nodes whose links are limited."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.planning import shaped_nodes
from tests.project.commands import ROOT


@pytest.mark.distributed
@pytest.mark.long
def test_nodes_with_limited_links_send_what_the_plan_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes.require("tc")
    monkeypatch.chdir(ROOT)
    config = ROOT / "configs" / "debug.yaml"
    assert shaped_nodes.main([str(config), "--output", str(tmp_path), "--rate", "400mbit"]) == 0
    compared = [line.rsplit(maxsplit=5) for line in capsys.readouterr().out.splitlines() if line.endswith(" %")]
    found = {row[0].strip(): float(row[-2]) for row in compared}
    assert abs(found["sent by a device in a step"]) <= 1
    assert abs(found["memory of a device"]) <= 5
    assert "waiting for the network" in found
