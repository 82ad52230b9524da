"""docs/draw_runs.py draws losses, scores and examples of a run folder, and says which run is missing."""

from __future__ import annotations

import io
import json
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch_scripts import prepare_digits
from tests.project.commands import ROOT
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import load_config
from trainer.evaluation.prepare import prepare

CONFIGURATION = ROOT / "configs/quickstart/evaluate.yaml"
NAMES = ("quickstart_loss.svg", "quickstart_examples.png", "in_context_shots.svg", "in_context_examples.png")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/draw_runs.py"))


def write_run(folder: Path) -> None:
    """Write a finished quickstart with three steps, whose answers are right but for the first of each task."""
    (folder / "flamingo").mkdir(parents=True)
    losses = [{"step": step, "loss/pairs": 1 / step, "loss/documents": 0.9 / step} for step in (1, 2, 3)]
    (folder / "flamingo/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    lines = []
    for task in prepare(load_config(CONFIGURATION, [], EvaluationConfig, check_files=False)):
        for number, query in enumerate(task.queries):
            right = list(query.answers)
            answer = {"answer": right[0] if number else "a wrong answer", "score": float(number > 0), "answers": right}
            lines.append({"task": task.name, "id": query.id, "shots": task.shots[-1], "control": "none", **answer})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.json").write_text("{}")


def test_it_draws_a_run(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = prepare_digits.Settings(pairs=2, documents=2, sentences=2, evaluation=5)
    assert prepare_digits.prepare(tmp_path / "data/quickstart", settings) == 0
    write_run(tmp_path / "runs/quickstart")
    assert script["main"](["--output", "pictures"]) == 0
    assert "launch_scripts/in_context.sh" in capsys.readouterr().err
    svg = (tmp_path / "pictures/quickstart_loss.svg").read_text(encoding="utf-8")
    assert len(ET.fromstring(svg).findall("{*}path[@class='line1']")) == 2, "the curve, and its line of the legend"
    assert "documents to 0.300 and pairs to 0.333" in svg
    assert "prefers-color-scheme: dark" in svg
    with Image.open(tmp_path / "pictures/quickstart_examples.png") as sheet:
        assert sheet.width > 900 and len(sheet.convert("RGB").getcolors(1 << 20) or ()) > 8


def test_the_examples_are_those_of_the_predictions(script: dict[str, Any]) -> None:
    prompt_type, special = script["Prompt"], script["Special"]
    pixels = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(pixels, "PNG")
    medium = type("Medium", (), {"read": lambda self: pixels.getvalue()})()
    prompt = prompt_type(["", special.IMAGE, "a six", special.END_OF_CHUNK, special.IMAGE], [medium, medium])
    assert script["_texts_after_images"](prompt) == ["a six", ""]
    right, wrong = ({"answer": "two", "answers": ["two"], "score": score} for score in (1.0, 0.0))
    assert script["_card"](prompt, right).tobytes() != script["_card"](prompt, wrong).tobytes()


def test_it_draws_scores_over_demonstrations(script: dict[str, Any], tmp_path: Path) -> None:
    cells = {shots: {"score": 0.5, "controls": {"no_images": {"score": 0.125}}} for shots in ("2", "4")}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"tasks": {"naming": {"shots": cells}}}))
    svg = script["few_shot_plot"](report, "naming").svg()
    assert "real prompts 0.50, 0.50; no images 0.12, 0.12" in svg
    assert len(ET.fromstring(svg).findall("{*}circle")) == 4
    with pytest.raises(ValueError, match="it has naming"):
        script["few_shot_plot"](report, "binding")


def test_missing_runs_are_named(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script["main"](["--output", "pictures"]) == 1
    assert re.findall(r"launch_scripts/(\w+)\.sh", capsys.readouterr().err) == ["quickstart", "in_context"]


def test_a_run_without_losses_is_refused(script: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no loss"):
        script["loss_curve"](tmp_path / "metrics.jsonl")


def test_the_committed_pictures_are_small_and_shown() -> None:
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"(images/{name})" in page
        assert 1000 < (ROOT / "docs/images" / name).stat().st_size < 60_000
