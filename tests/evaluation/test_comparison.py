"""Test the comparison of two evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.comparison import compare, main


def write(folder: Path, lines: Sequence[Mapping[str, Any]], metric: str = "exact") -> Path:
    folder.mkdir()
    names = {line["task"] for line in lines}
    (folder / "report.json").write_text(json.dumps({"tasks": {name: {"metric": metric} for name in names}}))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(name: str, score: float | None, **changes: Any) -> dict[str, Any]:
    fixed = {"task": "t", "shots": 4, "control": "none", "cluster": name, "answers": ["x"], "scores": {}}
    return {**fixed, "id": name, "score": score, **changes}


def test_queries_pair_by_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [line("p", 1.0), line("q", 0.0), line("r", 0.0)])
    b = write(tmp_path / "b", [line("r", 1.0), line("p", 1.0), line("q", 0.0)])
    (row,) = compare(a, b / "report.json")
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((1 / 3, 2 / 3, 1 / 3))
    assert (row["better"], row["worse"], row["queries"]) == (1, 0, 3)
    assert row["low"] < 1 / 3 < row["high"]
    assert main([str(a), str(b), "--json", str(tmp_path / "rows.json")]) == 0
    assert "+0.3333" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]


def test_one_image_has_no_bounds_and_unknown_answers_have_no_score(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [line("p", 1.0, cluster="i"), line("q", 0.0, cluster="i"), line("p", None, task="u")])
    (row, unknown) = compare(a, a)
    assert (row["difference"], row["low"], row["high"]) == (0.0, None, None)
    assert unknown["difference"] is None
    assert main([str(a), str(a)]) == 0


def test_rankings_compare_by_their_auc(tmp_path: Path) -> None:
    def lines(margins: Sequence[float]) -> list[dict[str, Any]]:
        answers = (["yes"], ["no"], ["yes"], ["no"])
        return [
            line(str(n), None, answers=answer, scores={"margin": margin})
            for n, (margin, answer) in enumerate(zip(margins, answers, strict=True))
        ]

    a, b = write(tmp_path / "a", lines([1, 0, 1, 2]), "roc_auc"), write(tmp_path / "b", lines([1, 0, 1, 0]), "roc_auc")
    (row,) = compare(a, b)
    assert (row["a"], row["b"], row["difference"]) == (0.5, 1.0, 0.5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("p", 1.0)], "task t, 4 shots, none: 1 queries are in A only, such as 'q'"),
        ([line("p", 1.0), line("q", 1.0), line("s", 1.0)], "1 queries are in B only, such as 's'"),
        ([line("p", 1.0), line("q", 1.0, answers=["y"])], "1 queries have other right answers, such as 'q'"),
        (
            [line("p", 1.0, shots=8)],
            "no task with the same name, shots and control: t (4 shots, none) beside t (8 shots",
        ),
        ([line("p", 1.0), line("p", 1.0)], "predictions.jsonl, line 2: query 'p' was answered before"),
        ([line("p", 1.0), line("q", float("nan"))], "nan"),
        ([], "beside nothing"),
    ],
)
def test_evaluations_that_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[dict[str, Any]], message: str
) -> None:
    a, b = write(tmp_path / "a", [line("p", 1.0), line("q", 0.0)]), write(tmp_path / "b", lines)
    assert main([str(a), str(b)]) == 2
    found = capsys.readouterr().err
    assert message.replace("in A only", f"in {a} only").replace("in B only", f"in {b} only") in found


def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [line("p", 1.0)])
    (tmp_path / "other.json").write_text("[]")
    for path, message in ((tmp_path / "other.json", "other.json is no report"), (tmp_path / "none", "none")):
        assert main([str(a), str(path)]) == 2
        assert message in capsys.readouterr().err
    (a / "predictions.jsonl").write_text('{"task": "t"}\n')
    assert main([str(a), str(a)]) == 2
    assert "predictions.jsonl, line 1" in capsys.readouterr().err
