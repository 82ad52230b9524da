"""The command answers every query once, and its results depend on neither batches, kills nor the order of the files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation import layouts
from trainer.config.evaluation_config import EvaluationConfig
from trainer.errors import ConfigError
from trainer.evaluation import command
from trainer.evaluation.answering import Answerer
from trainer.evaluation.ranks import Ranks


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the export of a tiny model."""
    return layouts.write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    """Keep torch's number of threads: an evaluation sets it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def evaluate(config: EvaluationConfig) -> int:
    """Evaluate in this process."""
    return command.evaluate(config, Ranks)


def results(config: EvaluationConfig) -> tuple[bytes, bytes]:
    """Return the bytes of the report and of the predictions."""
    assert sorted(path.name for path in config.output.iterdir() if path.is_file()) == [
        "predictions.jsonl",
        "report.json",
    ]
    return tuple((config.output / name).read_bytes() for name in ("report.json", "predictions.jsonl"))  # type: ignore[return-value]


def lines(config: EvaluationConfig) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl."""
    return [json.loads(line) for line in (config.output / "predictions.jsonl").read_text().splitlines()]


def all_tasks(folder: Path) -> list[dict[str, Any]]:
    """Write a task of each kind of prompt and metric."""
    coco, vqa = layouts.write_coco(folder / "coco"), layouts.write_vqa(folder / "vqa")
    support = layouts.write_vqa(folder / "vqa", 4, first=50)
    memes = layouts.write_memes(folder / "memes")
    more = layouts.write_memes(folder / "memes", "train", 20, 8)["annotations"]
    episodes = layouts.write_episodes(folder / "episodes")
    return [
        {"name": "coco", "type": "coco", **coco, "support_annotations": coco["annotations"], "controls": ["blank"]},
        {
            "name": "vqa",
            "type": "vqa",
            **vqa,
            "controls": ["shuffled_query", "no_images"],
            "support_questions": support["questions"],
            "support_annotations": support["annotations"],
        },
        {"name": "memes", "type": "hateful_memes", **memes, "support_annotations": more, "controls": []},
        {"name": "classes", "type": "image_folder", **layouts.write_classes(folder), "shots": [0]},
        {"name": "videos", "type": "video_qa", **layouts.write_video_qa(folder / "videos"), "shots": [0]},
        {"name": "episodes", "type": "episodes", **episodes, "controls": ["exchanged_demonstrations"]},
    ]


def test_every_query_of_every_cell_is_answered_once(tmp_path: Path, export: Path) -> None:
    config = layouts.evaluation(tmp_path, export, all_tasks(tmp_path), shots=[0, 2], orders=2)
    assert evaluate(config) == 0
    report = json.loads((config.output / "report.json").read_text())
    queries = {"coco": 6, "vqa": 6, "memes": 6, "classes": 6, "videos": 2, "episodes": 4}
    metrics = {name: task["metric"] for name, task in report["tasks"].items()}
    assert metrics == {
        "coco": "cider",
        "vqa": "vqa_accuracy",
        "memes": "roc_auc",
        "classes": "top1",
        "videos": "top1",
        "episodes": "exact",
    }
    found = [(line["task"], line["shots"], line["control"], line["id"]) for line in lines(config)]
    assert len(found) == len(set(found)) == 6 * 4 + 6 * 6 + 6 * 2 + 6 + 2 + 4 * 3
    for name, task in report["tasks"].items():
        for cell in task["shots"].values():
            assert cell["queries"] == queries[name]
            assert cell["low"] <= cell["score"] <= cell["high"]
    vqa = report["tasks"]["vqa"]["shots"]["2"]
    assert set(vqa["groups"]) == {"question_type/what", "question_type/how many", "answer_type/other"}
    assert set(vqa["controls"]) == {"shuffled_query", "no_images"}
    assert {"score", "low", "high", "queries", "groups", "difference"} == set(vqa["controls"]["no_images"])
    assert set(report["tasks"]["episodes"]["shots"]["2"]["scores"]) == {"other"}
    line = next(one for one in lines(config) if one["task"] == "memes" and one["shots"] == 2)
    assert set(line["candidates"]) == {"yes", "no"}
    assert len(line["demonstrations"]) == 2
    answers = json.loads((config.output / "evalai" / "vqa-0-shots.json").read_text())
    assert [one["question_id"] for one in answers] == [1000, 2000, 3000, 4000, 5000, 6000]


def test_batches_and_padding_change_no_byte(tmp_path: Path, export: Path) -> None:
    tasks = [task for task in all_tasks(tmp_path) if task["name"] in ("vqa", "episodes", "classes")]
    config = layouts.evaluation(tmp_path, export, tasks, shots=[0, 2], num_beams=2)
    assert evaluate(config) == 0
    report = (config.output / "report.json").read_bytes()
    answers = [line["answer"] for line in lines(config)]
    other = replace(config, batch_size=1, output=tmp_path / "other")
    assert evaluate(other) == 0
    assert (other.output / "report.json").read_bytes() == report
    assert [line["answer"] for line in lines(other)] == answers
    assert len(set(answers)) > 4, "the answers differ from each other"


def test_an_evaluation_goes_on_after_a_kill(tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = {"name": "episodes", "type": "episodes", **layouts.write_episodes(tmp_path, 6)}
    config = layouts.evaluation(tmp_path, export, [episodes], shots=[0, 1], batch_size=2)
    assert evaluate(config) == 0
    whole = results(config)
    answered: list[str] = []
    answer = Answerer.answer

    def counted(self: Answerer, task: Any, cell: Any, queries: Any) -> Any:
        if len(answered) == 4 and "again" not in answered:
            raise KeyboardInterrupt
        answered.extend(query.id for query in queries)
        return answer(self, task, cell, queries)

    monkeypatch.setattr(Answerer, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    (part,) = (config.output / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:-40])  # the kill cut off the second line
    answered.append("again")
    assert evaluate(config) == 0
    assert results(config) == whole
    assert answered[5:] == ["e2", "e3", "e4", "e5", *(f"e{number}" for number in range(6))]


def test_predictions_of_other_settings_are_not_taken(tmp_path: Path, export: Path) -> None:
    vqa = {"name": "vqa", "type": "vqa", **layouts.write_vqa(tmp_path)}
    config = layouts.evaluation(tmp_path, export, [vqa], zero_shot_examples=0)
    tasks = command.prepare(config)
    (before,) = command.cell_fingerprints(tasks, {}).values()
    for changed in (replace(config, num_beams=2), replace(config, seed=1), replace(config, prompt_style="plain")):
        assert command.cell_fingerprints(command.prepare(changed), {}).keys() == {tasks[0].cells[0]}
        assert before not in command.cell_fingerprints(command.prepare(changed), {}).values()
    assert before not in command.cell_fingerprints(tasks, {"trained": "other"}).values()
    assert [before] == list(command.cell_fingerprints(command.prepare(replace(config, shots=(0,))), {}).values())


def test_a_missed_bound_gives_exit_code_1(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bounds = [{"minimum": 0.5}, {"score": "other", "shots": 1, "maximum": 2}]
    episodes = {"name": "e", "type": "episodes", **layouts.write_episodes(tmp_path), "bounds": bounds}
    config = layouts.evaluation(tmp_path, export, [episodes], shots=[0, 1])
    assert command.run(config) == 1
    assert "missed: e, 0 shots: 0, should be >= 0.5" in capsys.readouterr().err
    report = json.loads((config.output / "report.json").read_text())
    assert [bound["met"] for bound in report["bounds"]] == [False, False, True]


def test_prompts_that_have_no_room_are_refused_before_the_model_loads(tmp_path: Path, export: Path) -> None:
    coco = layouts.write_coco(tmp_path, 20)
    task = {"name": "a", "type": "coco", **coco, "support_annotations": coco["annotations"]}
    config = layouts.evaluation(tmp_path, export, [task], shots=[0, 16])
    with pytest.raises(ConfigError, match=r"tasks\.0\.shots: 16 shots of 'a' need \d+ tokens .* has 64 positions"):
        evaluate(config)
    assert command.run(config) == 2


def test_an_image_that_cannot_be_decoded_is_named(
    tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = layouts.write_coco(tmp_path)
    damaged = tmp_path / "images" / "000000000006.jpg"
    damaged.write_bytes(damaged.read_bytes()[:40])
    config = layouts.evaluation(tmp_path, export, [{"name": "a", "type": "coco", **coco}], zero_shot_examples=0)
    assert command.run(config) == 1
    assert f"trainer.evaluate: {damaged}: " in capsys.readouterr().err
    assert not (config.output / "report.json").exists()
    layouts.write_image(damaged, 6)
    assert command.run(config) == 0


def test_episodes_of_text_alone_test_the_language_model(tmp_path: Path, export: Path) -> None:
    shown = [{"before": "w1", "text": " w2 w5"}, {"before": " w3", "text": " w4 w5"}]
    episode = {"id": "e", "demonstrations": shown, "query": {"before": " w1"}, "answers": ["w2"]}
    file = layouts.write_json_lines(
        tmp_path / "text.jsonl", [episode, {**episode, "id": "f", "query": {"before": " w3"}}]
    )
    task = {"name": "text", "type": "episodes", "episodes": str(file), "stop_texts": ["w5"]}
    config = layouts.evaluation(tmp_path, export, [task], shots=[0, 2])
    assert evaluate(config) == 0
    assert all("w5" not in line["answer"] for line in lines(config))
    (tmp_path / "alone").mkdir()
    alone = layouts.evaluation(tmp_path / "alone", export, [{**task, "controls": ["language_model_alone"]}], shots=[2])
    assert evaluate(alone) == 0
    assert {line["control"] for line in lines(alone)} == {"none", "language_model_alone"}
    with pytest.raises(ConfigError, match="its queries have no images"):
        evaluate(layouts.evaluation(tmp_path, export, [{**task, "controls": ["no_images"]}]))


def test_rices_shows_the_most_similar_image_last(tmp_path: Path, export: Path) -> None:
    coco = layouts.write_coco(tmp_path, 3)
    support = layouts.write_coco(tmp_path, 8, first=50)
    for number in (51, 53, 55):  # the very images of the queries
        layouts.write_image(tmp_path / "images" / f"{number:012}.jpg", (number - 49) // 2)
    task = {"name": "a", "type": "coco", **coco, "support_annotations": support["annotations"]}
    config = layouts.evaluation(tmp_path, export, [task], shots=[1, 3], demonstrations="rices")
    assert evaluate(config) == 0
    shown = {(line["shots"], line["id"]): line["demonstrations"] for line in lines(config)}
    assert [shown[1, str(number)] for number in (1, 2, 3)] == [["51"], ["53"], ["55"]]
    assert all(shown[3, str(number)][2:] == shown[1, str(number)] for number in (1, 2, 3))
    # A training set with the queries' own images shows others.
    config = layouts.evaluation(tmp_path, export, [{**task, "support_annotations": coco["annotations"]}], shots=[2])
    assert evaluate(replace(config, demonstrations="rices")) == 0
    assert all(line["id"] not in line["demonstrations"] for line in lines(config))
