"""Read what ``prepare_easy_vqa.py`` writes: captions and texts are true, and training sees no test question."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launch_scripts import prepare_easy_vqa
from launch_scripts.easy_vqa_language import COLORS, answer_to, facts, prompt_of, question_type, texts, things_in
from tests.project.test_prepare_digits import samples

easy_vqa = pytest.importorskip("easy_vqa")
PACKAGE = Path(easy_vqa.__file__).parent / "data"
SETTINGS = prepare_easy_vqa.Settings(texts=300, questions=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("easy_vqa")
    assert prepare_easy_vqa.prepare(folder, SETTINGS) == 0
    return folder


@pytest.fixture(scope="module")
def parts() -> dict[str, prepare_easy_vqa.Part]:
    return prepare_easy_vqa.split(PACKAGE, prepare_easy_vqa.Settings())


def test_the_parts_have_the_sizes_that_the_documents_name(parts: dict[str, prepare_easy_vqa.Part]) -> None:
    assert {name: len(part.questions) for name, part in parts.items()} == {
        "train": 34_687,
        "validation": 3_888,
        "test": 9_673,
    }
    kinds = Counter(question_type(question.text, question.answer) for question in parts["test"].questions)
    assert kinds == {"absent": 5890, "color": 1280, "shape": 1257, "present": 1246}
    assert parts["train"].images == parts["validation"].images != parts["test"].images
    held_out = {question.image for question in parts["validation"].questions}
    assert not held_out & {question.image for question in parts["train"].questions}


def test_the_facts_of_an_image_give_its_answers(parts: dict[str, prepare_easy_vqa.Part]) -> None:
    complete = 0
    for questions in parts["train"].by_image().values():
        color, shape = facts([(question.text, question.answer) for question in questions])
        if color is not None and shape is not None:
            complete += 1
            assert all(answer_to(question.text, color, shape) == question.answer for question in questions)
    assert complete == 3191


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what color is the circle?", "teal", "color"),
        ("what is the blue shape?", "circle", "shape"),
        ("is there a circle?", "yes", "present"),
        ("is no circle present?", "no", "present"),
        ("is there not a circle in the image?", "yes", "absent"),
        ("does the image contain a circle?", "no", "absent"),
    ],
)
def test_types_of_questions(question: str, answer: str, kind: str) -> None:
    assert question_type(question, answer) == kind


def test_samples_of_training(data: Path) -> None:
    caption, *_ = samples(data / "train/captions")
    assert caption["txt"].decode().split()[0] == "a"
    answers = samples(data / "train/answers")
    assert len(answers) == 400
    assert set(answers[0]) >= {"png", "prompt.txt", "txt"}
    rows = json.loads((PACKAGE / "train/questions.json").read_text())[:400]
    written = Counter((sample["prompt.txt"].decode(), sample["txt"].decode()) for sample in answers)
    assert written == Counter((prompt_of(question), answer) for question, answer, _ in rows)


def test_questions_are_in_the_layout_of_vqav2(data: Path) -> None:
    for name, count in (("validation", 400), ("test", 400)):
        questions = json.loads((data / name / "questions.json").read_text())["questions"]
        annotations = json.loads((data / name / "annotations.json").read_text())["annotations"]
        assert len(questions) == len(annotations) == len({one["question_id"] for one in questions}) == count
        for question, annotation in zip(questions, annotations, strict=True):
            assert (data / name / "images" / f"{question['image_id']}.png").is_file()
            assert question["question_id"] == annotation["question_id"]
            assert [given["answer_id"] for given in annotation["answers"]] == list(range(1, 11))
            assert {given["answer"] for given in annotation["answers"]} == {annotation["multiple_choice_answer"]}
        assert {one["answer_type"] for one in annotations} == {"yes/no", "other"}
        assert {one["question_type"] for one in annotations} == {"color", "shape", "present", "absent"}


def test_texts_answer_their_questions_by_the_fact(parts: dict[str, prepare_easy_vqa.Part]) -> None:
    questions = {question.text for question in parts["train"].questions}
    kinds: Counter[tuple[str, bool]] = Counter()
    for text in texts(np.random.default_rng(0), 4000, sorted(questions)):
        fact = re.match(r"a (\w+) (\w+) ", text)
        for question, answer in re.findall(r"Question: (.+?\?) Answer: (\w+)", text) if fact else ():
            if question in questions:
                assert answer_to(question, fact[1], fact[2]) == answer
                kinds[question_type(question, answer), not set(COLORS).isdisjoint(things_in(question))] += 1
    yes_no = {key: count for key, count in kinds.items() if key[0] in ("present", "absent")}
    assert len(yes_no) == 4  # colors and shapes, there or not: equally often, so that only the fact tells the answer
    assert all(0.22 < count / sum(yes_no.values()) < 0.28 for count in yes_no.values())
    assert things_in("is there not a red circle?") == ["red", "circle"]


def test_a_second_call_does_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_easy_vqa.prepare(data, SETTINGS) == 0
    assert capsys.readouterr().out == f"{data}: finished before with the same settings\n"


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_easy_vqa.importlib.util, "find_spec", lambda name: None)
    assert prepare_easy_vqa.main(["--output", str(tmp_path)]) == 1
    assert "the package easy-vqa is missing; install it: pip install" in capsys.readouterr().err
