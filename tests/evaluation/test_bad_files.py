"""All faults of all files are reported at once, with file and id, before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation import layouts
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import load_config
from trainer.errors import ConfigError
from trainer.evaluation.prepare import prepare


def problems(folder: Path, *tasks: dict[str, Any], **settings: Any) -> list[str]:
    """Return the problems of an evaluation; no model exists."""
    (folder / "export").mkdir(exist_ok=True)
    with pytest.raises(ConfigError) as caught:
        prepare(layouts.evaluation(folder, folder / "export", tasks, **settings))
    assert caught.value.exit_code == 2
    return [f"{problem.path}: {problem.message}" for problem in caught.value.problems]


def edit(path: str, change: Any) -> None:
    """Change a JSON file in place."""
    value = json.loads(Path(path).read_text())
    change(value)
    Path(path).write_text(json.dumps(value))


def test_all_faults_of_all_tasks_are_reported_at_once(tmp_path: Path) -> None:
    coco, vqa = layouts.write_coco(tmp_path / "coco"), layouts.write_vqa(tmp_path / "vqa")
    (tmp_path / "coco" / "images" / "000000000002.jpg").unlink()

    def damage_coco(value: Any) -> None:
        value["images"].append(value["images"][0])
        value["annotations"] = [one for one in value["annotations"] if one["image_id"] != 3]
        value["images"][3]["file_name"] = 5

    def damage_annotations(value: Any) -> None:
        value["annotations"][0]["answers"] = []
        del value["annotations"][1]
        value["annotations"].append({**value["annotations"][-1], "question_id": 77})

    edit(coco["annotations"], damage_coco)
    edit(vqa["annotations"], damage_annotations)
    edit(vqa["questions"], lambda value: value["questions"].append(value["questions"][0]))
    found = problems(
        tmp_path, {"name": "coco", "type": "coco", **coco}, {"name": "vqa", "type": "vqa", **vqa}, zero_shot_examples=0
    )
    assert sorted(found) == sorted(
        [
            f"tasks.0.annotations: {coco['annotations']}: entry lacks 'file_name', or it is of another type: entry 3",
            f"tasks.0.images: {coco['annotations']}: its images are missing: 2 ({coco['images']}/000000000002.jpg)",
            f"tasks.0.annotations: {coco['annotations']}: image has no caption: 3",
            f"tasks.0.annotations: {coco['annotations']}: image id stands more than once: 1",
            f"tasks.0.annotations: {coco['annotations']}: captions of an image that is not in the list: 4",
            f"tasks.1.annotations: {vqa['annotations']}: list of answers is empty: 1000",
            f"tasks.1.questions: {vqa['questions']}: question has no annotation: 2000",
            f"tasks.1.questions: {vqa['questions']}: question id stands more than once: 1000",
            f"tasks.1.questions: {vqa['questions']}: annotation has no question: 77",
        ]
    )


def test_many_faults_of_a_kind_are_counted(tmp_path: Path) -> None:
    coco = layouts.write_coco(tmp_path, 9)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    (found,) = problems(tmp_path, {"name": "a", "type": "coco", **coco}, zero_shot_examples=0)
    assert "5 (" in found
    assert found.endswith("and 4 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is a list, not an object: is it another file?"),
        ("{", "cannot be read (invalid_json"),
        ('{"images": []}', "has no list 'annotations' (it has images): is it another file?"),
        ("\xff", "cannot be read (invalid"),
    ],
)
def test_json_of_another_kind(tmp_path: Path, content: str, message: str) -> None:
    coco = layouts.write_coco(tmp_path)
    Path(coco["annotations"]).write_text(content, encoding="latin-1")
    found = problems(tmp_path, {"name": "a", "type": "coco", **coco})
    assert any(message in problem and coco["annotations"] in problem for problem in found)


def test_annotations_in_the_place_of_questions(tmp_path: Path) -> None:
    vqa = layouts.write_vqa(tmp_path)
    vqa["questions"], vqa["annotations"] = vqa["annotations"], vqa["questions"]
    found = problems(tmp_path, {"name": "a", "type": "vqa", **vqa})
    assert any("has no list 'questions' (it has info" in problem for problem in found)
    assert any("has no list 'annotations'" in problem for problem in found)


def test_more_shots_than_the_training_set_has(tmp_path: Path) -> None:
    coco = layouts.write_coco(tmp_path)
    support = layouts.write_coco(tmp_path, 3, first=50)["annotations"]
    task = {"name": "a", "type": "coco", **coco}
    (found,) = problems(tmp_path, {**task, "support_annotations": support}, shots=[0, 4])
    assert found.startswith("tasks.0.shots: 4 is more than the 3 demonstrations")
    # A query's own image is no demonstration.
    (found,) = problems(tmp_path, {**task, "support_annotations": coco["annotations"]}, shots=[6])
    assert found.startswith("tasks.0.shots: 6 is more than the 5 demonstrations")
    (found,) = problems(tmp_path, task)
    assert "zero_shot_examples 2 of task 'a' needs a training set" in found
    (found,) = problems(tmp_path, {"name": "e", "type": "episodes", **layouts.write_episodes(tmp_path)}, shots=[3])
    assert found.startswith("tasks.0.shots: 3 is more than the 2 demonstrations of 'e0'")


def test_controls_and_bounds_that_do_not_suit_the_task(tmp_path: Path) -> None:
    coco = {"name": "a", "type": "coco", **layouts.write_coco(tmp_path)}
    bounds = [
        {"minimum": 1},
        {"shots": 4, "minimum": 1},
        {"control": "blank", "maximum": 1},
        {"group": "x", "minimum": 0},
    ]
    bounds += [{}, {"minimum": 1, "maximum": 0}]  # type: ignore[list-item]
    task = {**coco, "controls": ["exchanged_demonstrations", "shuffled_query"], "bounds": bounds}
    found = problems(tmp_path, task, zero_shot_examples=0)
    assert [problem.partition(": ")[0] for problem in found] == [
        "tasks.0.controls",
        "tasks.0.bounds.1.shots",
        "tasks.0.bounds.2.control",
        "tasks.0.bounds.3.group",
        "tasks.0.bounds.4",
        "tasks.0.bounds.5.minimum",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line cannot be read"),
        ("[]", "line is not an object: line 5"),
        ('{"id": "x", "query": {}}', "answers is no list of texts, or it is empty: x"),
        (
            '{"id": "x", "query": {"picture": 1}, "answers": ["a"]}',
            "a piece is not an object of before, image and text",
        ),
        ('{"id": "x", "query": {"image": "none.png"}, "answers": ["a"]}', "its images are missing: x"),
        ('{"id": "e0", "query": {"image": "0_0.png"}, "answers": ["a"]}', "id stands more than once: e0"),
        ('{"id": "x", "query": {}, "answers": ["a"], "exchange": [0]}', "exchange does not name a demonstration"),
        ('{"id": "x", "query": {}, "answers": ["a"], "candidates": []}', "candidates is no list of texts"),
        (
            '{"id": "x", "query": {}, "answers": ["a"], "candidates": ["a"]}',
            "some episodes have candidates, others have none",
        ),
    ],
)
def test_episodes_of_another_format(tmp_path: Path, line: str, message: str) -> None:
    values = layouts.write_episodes(tmp_path)
    with Path(values["episodes"]).open("a") as file:
        file.write(line + "\n")
    found = problems(tmp_path, {"name": "a", "type": "episodes", **values})
    assert any(message in problem and values["episodes"] in problem for problem in found), found


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"context": "{text}"}, "names a field that the queries lack; they have {question}"),
        ({"context": "{"}, "write {{ for a brace"),
        ({"answer": "x"}, "has no {answer}"),
    ],
)
def test_prompts_that_cannot_be_written(tmp_path: Path, prompt: dict[str, str], message: str) -> None:
    task = {"name": "a", "type": "vqa", **layouts.write_vqa(tmp_path), "prompt": prompt}
    (found,) = problems(tmp_path, task, zero_shot_examples=0)
    assert found.startswith("tasks.0.prompt: ")
    assert message in found


def test_an_image_path_without_a_place_for_the_id(tmp_path: Path) -> None:
    vqa = layouts.write_vqa(tmp_path)
    for images, message in ((tmp_path / "val2014", "it has no {image_id}"), (tmp_path / "{picture}.jpg", "'picture'")):
        found = problems(tmp_path, {"name": "a", "type": "vqa", **vqa, "images": str(images)}, zero_shot_examples=0)
        assert any("tasks.0.images" in problem and message in problem for problem in found)


def test_choices_without_the_answer(tmp_path: Path) -> None:
    videos = layouts.write_video_qa(tmp_path)
    edit(videos["annotations"], lambda value: value[0].update(answer="w40"))
    edit(videos["annotations"], lambda value: value[1].pop("choices"))
    found = problems(tmp_path, {"name": "a", "type": "video_qa", **videos})
    assert [problem.rpartition("qa.json: ")[2] for problem in found] == [
        "answer is not among the choices: q0",
        "question has no choices, and the setting answers names no file: q1",
    ]


def test_an_unknown_task_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("{model: m, output: o, tasks: [{name: a, type: vqa2, questions: q}]}")
    with pytest.raises(ConfigError, match="'vqa2' is not one of") as caught:
        load_config(path, [], EvaluationConfig)
    assert "did you mean 'vqa'?" in str(caught.value)
