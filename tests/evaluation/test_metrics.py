"""Test the metrics against the official values, which Java and the official code gave."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trainer.evaluation.metrics import cider, exact, normalize_answer, ptb_tokenize, roc_auc, top_k, vqa_accuracy

FIXTURE = json.loads((Path(__file__).parent / "ptb_fixture.json").read_text(encoding="utf-8"))


def test_tokens_are_those_of_java() -> None:
    found = {one["caption"]: ptb_tokenize(one["caption"]) for one in FIXTURE["tokens"]}
    wrong = [one for one in FIXTURE["tokens"] if found[one["caption"]] != one["tokens"]]
    assert not wrong, [(one["tokens"], found[one["caption"]]) for one in wrong]


def test_cider_is_that_of_the_official_pipeline() -> None:
    images = {f"{number}": one for number, one in enumerate(FIXTURE["images"])}
    found = cider(
        {name: one["references"] for name, one in images.items()},
        {name: one["prediction"] for name, one in images.items()},
    )
    assert found == pytest.approx({name: one["cider"] for name, one in images.items()}, abs=1e-6)
    assert sum(found.values()) / len(found) == pytest.approx(FIXTURE["cider"], abs=1e-6)
    assert max(found.values()) > 1


@pytest.mark.parametrize("breaks", ["\r", "\u2028", "\x0b", "\r\n", "\x85"])
def test_a_line_break_in_a_caption_moves_no_other_caption(breaks: str) -> None:
    plain = cider({"a": ["a red cat"], "b": ["a blue dog"]}, {"a": "a red cat", "b": "a blue dog"})
    broken = cider({"a": [f"a{breaks}red cat"], "b": ["a blue dog"]}, {"a": f"a red{breaks}cat", "b": "a blue dog"})
    assert broken == plain


def test_cider_of_empty_and_single_captions() -> None:
    assert cider({}, {}) == {}
    assert cider({"a": [""]}, {"a": ""}) == {"a": 0.0}
    assert cider({"a": ["a cat"]}, {"a": "a cat"}) == {"a": 0.0}  # one image: no word is informative
    assert cider({"a": ["a cat"], "b": ["dogs"]}, {"a": "", "b": "dogs"})["a"] == 0.0


def test_cider_refuses_other_images_and_missing_references() -> None:
    with pytest.raises(ValueError, match="'b'"):
        cider({"a": ["x"], "b": ["y"]}, {"a": "x"})
    with pytest.raises(ValueError, match="no reference"):
        cider({"a": []}, {"a": "x"})


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(10, 1.0), (5, 1.0), (4, 1.0), (3, 0.9), (2, 0.6), (1, 0.3), (0, 0.0)]
)
def test_vqa_accuracy_has_the_official_values(agreeing: int, expected: float) -> None:
    annotators = ["cat"] * agreeing + [f"dog {number}" for number in range(10 - agreeing)]
    assert vqa_accuracy("Cat.", annotators) == pytest.approx(expected, abs=1e-12)
    assert vqa_accuracy("The cat", ["A cat"] * 10) == 1.0  # equal answers are normalized too


def test_a_single_annotator_is_right_or_wrong() -> None:
    assert (vqa_accuracy("a circle", ["Circle"]), vqa_accuracy("square", ["circle"])) == (1.0, 0.0)
    with pytest.raises(ValueError, match="no annotated answer"):
        vqa_accuracy("x", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("Two", "2"),
        ("none", "0"),
        ("a the an", ""),
        ("dont", "don't"),
        ("wouldnt've", "wouldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("3.5 m.", "3.5 m"),
        ("well-known", "well known"),
        ("Yes\n", "yes"),
        ("9/11", "9 11"),
    ],
)
def test_answers_are_normalized_as_officially(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_top_k_and_auc() -> None:
    assert (exact(" cat ", ["cat"]), exact("Cat", ["cat"]), exact("", [""])) == (1.0, 0.0, 1.0)
    likelihoods = {"a": -1.0, "b": -1.0, "c": -3.0}
    assert [top_k(likelihoods, ["b"], k) for k in (1, 2, 5)] == [0.0, 1.0, 1.0]  # of a tie, the first one wins
    assert roc_auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert roc_auc([1.0, 1.0], [True, False]) == 0.5
    with pytest.raises(ValueError, match="both labels"):
        roc_auc([1.0, 2.0], [True, True])
    with pytest.raises(ValueError, match="nan"):
        roc_auc([math.nan, 2.0], [True, False])
    with pytest.raises(ValueError, match="nan"):
        top_k({"a": math.nan}, ["a"], 1)
