"""Test studies with stand-ins for the programs that train, export and evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models

from tests.project.commands import ROOT
from trainer import study
from trainer.studies import results as study_results
from trainer.studies.comparison import compare, over_seeds
from trainer.studies.results import CellResult

DEBUG = ROOT / "configs" / "debug.yaml"


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write a run's configuration that reads nothing which only other commands would make."""
    values = yaml.safe_load(DEBUG.read_text())
    (tmp_path / "tokenizer").mkdir()
    values["model"]["language_model"]["tokenizer"] = str(tmp_path / "tokenizer")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for index, source in enumerate(values["data"]["sources"]):
        source["manifest"] = str(tmp_path / f"{index}.npz")
        Path(source["manifest"]).touch()
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_study(tmp_path: Path, run: Path, /, **changes: Any) -> str:
    values = {
        "base": str(run),
        "output": str(tmp_path / "study"),
        "variants": {"paper": {}, "lora": {"model.trainable.language_model": "lora"}},
        "baseline": "paper",
        "seeds": [0, 1, 2],
        "overrides": {"training.steps": 20},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return str(path)


class Programs:
    """Stand for the programs: each run gets a loss of 2 + its seed, and 1 less with adapters."""

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.commands: list[list[str]] = []
        self.fails = fails

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        if any(word in " ".join(command) for word in self.fails):
            return 1
        settings = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
        if "run_dir" in settings:
            folder = Path(settings["run_dir"])
            (folder / "export").mkdir(parents=True)
            loss = 2 + int(settings["training.seed"]) - (settings.get("model.trainable.language_model") == "lora")
            lines = [json.dumps({"step": step, "loss": loss + (step < 15)}) for step in range(1, 21)]
            (folder / "metrics.jsonl").write_text("\n".join(lines))
        if "output" in settings:
            Path(settings["output"]).mkdir()
            shots = {"0": {"score": 0.5, "controls": {"blank": {"score": 0.1}}}}
            (Path(settings["output"]) / "report.json").write_text(json.dumps({"tasks": {"digits": {"shots": shots}}}))
        return 0


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    found = Programs()
    monkeypatch.setattr(study_results, "_start", lambda command: found(command))
    return found


class Balanced(HTMLParser):
    """Check that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_variant_and_seed_is_a_run_and_a_second_call_starts_none(
    tmp_path: Path, base: Path, programs: Programs
) -> None:
    path = write_study(tmp_path, base, last_steps=5)
    assert study.main([path]) == 0
    assert len(programs.commands) == 6
    assert all("--training.steps=20" in command for command in programs.commands)
    assert study.main([path]) == 0 and len(programs.commands) == 6
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    found = {one["variant"]: one for one in report["comparisons"]}
    assert found["paper"]["value"]["mean"] == 3 and found["lora"]["value"]["mean"] == 2
    assert found["lora"]["difference"] == {"mean": -1, "low": -1, "high": -1, "seeds": 3}
    page = (tmp_path / "study" / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and "6 of 6 runs" in page and "http" not in page


def test_scores_of_an_evaluation_are_compared(tmp_path: Path, base: Path, programs: Programs) -> None:
    evaluation = tmp_path / "evaluation.yaml"
    evaluation.touch()
    path = write_study(tmp_path, base, evaluation=str(evaluation), seeds=[0])
    assert study.main([path]) == 0
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert {one["score"] for one in report["comparisons"]} == {"loss", "tasks.digits.shots.0.score"}


def test_a_score_that_the_report_lacks_is_named(
    tmp_path: Path, base: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = tmp_path / "evaluation.yaml"
    evaluation.touch()
    path = write_study(tmp_path, base, evaluation=str(evaluation), seeds=[0], scores=["tasks.digit"])
    assert study.main([path]) == 1
    assert "no number tasks.digit; it has tasks.digits" in capsys.readouterr().err


def test_a_failed_run_does_not_end_the_others(tmp_path: Path, base: Path, programs: Programs) -> None:
    programs.fails = ["paper/seed-1"]
    assert study.main([write_study(tmp_path, base)]) == 1
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert report["complete"] == 5
    found = {one["variant"]: one["value"]["seeds"] for one in report["comparisons"]}
    assert found == {"paper": 2, "lora": 3}


def test_one_run_of_an_array(
    tmp_path: Path, base: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, base)
    assert study.main([path, "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert study.main([path, "--only", "4"]) == 0
    [command] = programs.commands
    assert "--training.seed=1" in command and "--model.trainable.language_model=lora" in command
    assert not (tmp_path / "study" / "report.json").exists()
    assert study.main([path, "--report"]) == 0
    assert json.loads((tmp_path / "study" / "report.json").read_text())["complete"] == 1
    assert study.main([path, "--only", "6"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "papper"}, "papper is no variant"),
        ({"seeds": []}, "seeds: is empty"),
        ({"seeds": [1, 1]}, "a seed twice"),
        ({"variants": {"paper": {}, "a/b": {}}}, "becomes a folder"),
        ({"base": "no.yaml"}, "no such file: no.yaml"),
        ({"variants": {"paper": {}, "wrong": {"training.stepz": 1, "optimizer.lr": -1}}}, "training.stepz"),
    ],
)
def test_wrong_studies_are_refused_before_any_run(
    tmp_path: Path,
    base: Path,
    programs: Programs,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code = study.main([write_study(tmp_path, base, **changes)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert ("wrong" not in str(changes)) or "optimizer.lr" in printed
    assert not programs.commands


def test_intervals_over_seeds_worked_out_by_hand() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2), deviation 1
    assert over_seeds([4.0]).low == 4.0


def test_differences_are_paired_by_seed() -> None:
    results = [CellResult("a", seed, {"loss": 10.0 * seed}, []) for seed in (0, 1, 2)]
    results += [CellResult("b", seed, {"loss": 10.0 * seed + 1 + 0.01 * seed}, []) for seed in (1, 2)]
    difference = next(one.difference for one in compare(results, "a") if one.variant == "b")
    assert difference is not None and difference.seeds == 2
    assert difference.mean == pytest.approx(1.015) and difference.excludes_zero
