"""Test how reports of nodes are judged; tests/distributed/test_multinode.py collects real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer import preflight
from trainer.resilience.node_checks import (
    MIN_FREE_GIB,
    NetworkReport,
    NodeReport,
    code_digest,
    folder_problems,
    node_problems,
    node_report,
    verdict_table,
)

GOOD = NodeReport("a", {"python": "3.11.7", "torch": "2.15.0"}, "c0de", "1234abc", 8, 500.0, "", 0.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.14.0"}}, "torch is 2.14.0, 2.15.0 on a"),
        ({"code": "0ther", "commit": "1234abc-dirty"}, "code differs from that of a (1234abc-dirty and 1234abc)"),
        ({"devices": 7}, "slots=8, but it has 7 GPUs"),
        ({"devices": None}, "it trains on CPUs, a on GPUs"),
        ({"folder_problem": "[Errno 30] Read-only"}, "run folder cannot be written: [Errno 30] Read-only"),
        ({"free_gib": 9.0}, "9.0 GiB are free"),
        ({"clock_skew": -61.0}, "its clock is 61 s behind"),
        ({"clock_skew": 7.0}, "its clock is 7 s ahead"),
    ],
)
def test_each_difference_is_one_problem(change: dict[str, Any], expected: str) -> None:
    assert list(node_problems(GOOD, GOOD, 8, MIN_FREE_GIB)) == []
    (problem,) = node_problems(replace(GOOD, name="b", **change), GOOD, 8, MIN_FREE_GIB)
    assert expected in problem


def test_the_table_has_a_verdict_for_each_node() -> None:
    network = NetworkReport("nccl", 12.5, 256, {"a": ["a", "b"], "b": ["b"]})
    names, reports = ["a", "b"], {"a": GOOD, "b": replace(GOOD, name="b")}
    problems = folder_problems(network, names)
    lines = verdict_table(names, reports, problems, network).splitlines()
    assert lines[1].split()[:3] == ["a", "ok", "2.15.0"]
    assert lines[2].split()[:2] == ["b", "FAILED"]
    assert "mount the same shared folder" in lines[3]
    assert lines[4] == "all-reduce of 256 MiB over 2 nodes: 12.50 GB/s a node (nccl)"
    assert lines[5] == "preflight: 1 of 2 nodes cannot train: b"
    assert verdict_table(names, reports, {}, network).endswith("2 of 2 nodes are ready")


def test_the_digest_covers_the_source_files(tmp_path: Path) -> None:
    for folder in ("model", "trainer", "csrc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "trainer" / "a.py").write_text("a = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "trainer" / "notes.txt").write_text("not code")
    assert code_digest(tmp_path) == before
    (tmp_path / "trainer" / "a.py").write_text("a = 2\n")
    changed = code_digest(tmp_path)
    (tmp_path / "trainer" / "a.py").rename(tmp_path / "trainer" / "b.py")
    assert len({before, changed, code_digest(tmp_path)}) == 3


def test_this_machine_reports_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    report = node_report(tmp_path / "run")
    assert (report.folder_problem, report.devices) == ("", None)
    assert report.versions["torch"] != "missing" and report.free_gib
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").touch()
    assert "file" in node_report(tmp_path / "file" / "run").folder_problem


def test_preflight_without_nodes_names_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert preflight.main([]) == 2
    assert "--hostfile" in capsys.readouterr().err
    assert preflight.main(["--hostfile", str(tmp_path / "nowhere")]) == 2
    assert "nowhere cannot be read" in capsys.readouterr().err
