"""Test the page of results: its plots, and the results that it refuses to plot together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trainer.benchmark import __main__ as benchmark
from trainer.benchmark.part_clock import PARTS
from trainer.benchmark.result_file import Measurement

RESULTS = Path(__file__).parent / "results"


def step_result(path: Path, processes: int, parameters: float = 4e6, without: str = "", **header: Any) -> str:
    measures = {
        "samples per second": 1.0 + processes,
        "peak memory of a process": parameters / 1e5,
        "peak memory of a device": 0.0,
        "parameters": parameters,
        **{f"part: {part}": 1.0 / processes for part in PARTS},
    }
    measures.pop(without, None)
    rows = [Measurement("step", "case", measure, "unit", value).as_json() for measure, value in measures.items()]
    head = {"benchmark": "step", "hardware": "CPU", "versions": {}, "processes": processes, "config": {}, **header}
    path.write_text(json.dumps([head, *rows]))
    return str(path)


def test_a_page_with_plots_and_without_a_network(tmp_path: Path) -> None:
    results = [step_result(tmp_path / f"{processes}.json", processes) for processes in (2, 1)]
    page = tmp_path / "page.html"
    assert benchmark.main(["report", str(RESULTS / "cpu-kernels.json"), *results, "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "3 samples/s, 75 % of ideal" in text
    assert "SDPA + dense mask" in text
    assert "http" not in text


def test_memory_is_plotted_against_the_size_of_the_model(tmp_path: Path) -> None:
    sizes = {4e6: {"lm": 1}, 8e6: {"lm": 2}, 16e6: {"lm": 3}}
    results = [
        step_result(tmp_path / f"{number}.json", 1, size, config={"model": model, "run_dir": str(number)})
        for number, (size, model) in enumerate(sizes.items())
    ]
    page = tmp_path / "page.html"
    assert benchmark.main(["report", *results, "--html", str(page)]) == 0
    text = page.read_text()
    heights = [float(cy) for cy in re.findall(r'<circle [^>]*cy="([0-9.]+)"', text)]
    assert len(heights) == 3 and heights == sorted(heights, reverse=True)
    assert "16 M parameters" in text and "of a device, 1 process" not in text


@pytest.mark.parametrize("without", ["parameters", "samples per second"])
def test_a_result_without_a_plotted_measure_is_refused(
    tmp_path: Path, without: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = step_result(tmp_path / "a.json", 1, without=without)
    assert benchmark.main(["report", result, "--html", str(tmp_path / "page.html")]) == 2
    assert f"lacks {without}" in capsys.readouterr().err


def test_two_results_of_the_same_case_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [step_result(tmp_path / name, 2) for name in ("a.json", "b.json")]
    assert benchmark.main(["report", *results, "--html", str(tmp_path / "page.html")]) == 2
    assert "b.json: another result is of 4 M parameters on 2 processes too" in capsys.readouterr().err


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
def test_a_file_that_is_not_a_result_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert benchmark.main(["report", str(tmp_path / "a.json"), "--html", str(tmp_path / "page.html")]) == 2
    assert "trainer.benchmark --json wrote" in capsys.readouterr().err
