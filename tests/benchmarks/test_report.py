"""The page of measurements: what it shows, and what it refuses to show together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import benchmark
from trainer.benchmarks.rows import Row
from trainer.benchmarks.step_parts import PARTS

RESULTS = Path(__file__).parent / "results"


def step_result(path: Path, processes: int, **header: Any) -> str:
    measures = ["samples per second, all", "peak memory of a process", *(f"part: {part}" for part in PARTS)]
    rows = [Row("step", "case", measure, "unit", 1.0 + processes).as_json() for measure in measures]
    head = {"benchmark": "step", "hardware": "CPU", "versions": {}, "processes": processes, "config": {}, **header}
    path.write_text(json.dumps([head, *rows]))
    return str(path)


def test_a_page_with_plots_and_without_a_network(tmp_path: Path) -> None:
    results = [step_result(tmp_path / f"{processes}.json", processes) for processes in (1, 2)]
    page = tmp_path / "page.html"
    assert benchmark.main(["report", str(RESULTS / "cpu-kernels.json"), *results, "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "2 processes" in text
    assert "SDPA + dense mask" in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"hardware": "another"}, "hardware"),
        ({"config": {"training": {"dtype": "float32"}}}, "config.training"),
        ({"versions": {"torch": "1"}}, "versions.torch"),
        ({"data": "real"}, "data"),
    ],
)
def test_different_results_do_not_share_a_plot(
    tmp_path: Path, header: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [step_result(tmp_path / "a.json", 1), step_result(tmp_path / "b.json", 2, **header)]
    assert benchmark.main(["report", *results, "--html", str(tmp_path / "page.html")]) == 2
    assert f"different {named}" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


HEAD = '{"benchmark": "step", "hardware": "CPU", "versions": {}}'


@pytest.mark.parametrize("text", ["[]", "[{", "3", "null", '["a"]', f'[{HEAD}, {{"measure": "time"}}]', f"[{HEAD}, 1]"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert benchmark.main(["report", str(tmp_path / "a.json"), "--html", str(tmp_path / "page.html")]) == 2
    assert "trainer.benchmark --json wrote" in capsys.readouterr().err
