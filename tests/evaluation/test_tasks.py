"""Original files are read as they are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from model.processor import ProcessorConfig
from tests.data.helpers import build_manifest, image_bytes, mmc4, write_shard
from tests.evaluation import layouts
from trainer.config.evaluation_tasks import ShardsTask, TaskSettings
from trainer.evaluation.media import MediaDecoder
from trainer.evaluation.query import FileMedium, TaskData
from trainer.evaluation.readers import READERS, read_task
from trainer.evaluation.tasks.findings import Findings


def read(kind: str, **settings: Any) -> TaskData:
    """Read a task without faults."""
    findings = Findings("tasks.0")
    data = read_task(TypeAdapter(TaskSettings).validate_python({"name": "task", "type": kind, **settings}), findings)
    assert findings.problems == []
    return data


def test_every_task_has_a_reader() -> None:
    assert len(READERS) == 11


def test_coco(tmp_path: Path) -> None:
    values = layouts.write_coco(tmp_path)
    data = read("coco", **values, support_annotations=layouts.write_coco(tmp_path, 3, first=50)["annotations"])
    assert [query.id for query in data.queries] == ["1", "2", "3", "4", "5", "6"]
    assert data.queries[1].answers == ("w2 w2", "w2 w3")
    assert data.queries[1].medium == FileMedium(tmp_path / "images" / "000000000002.jpg")
    assert [one.shown_answer for one in data.support] == ["w2 w2", "w3 w3", "w4 w4"]


def test_karpathy_demonstrations_have_train_and_restval(tmp_path: Path) -> None:
    data = read("karpathy", **layouts.write_karpathy(tmp_path))
    assert [query.id for query in data.queries] == ["1", "2"]
    assert [query.id for query in data.support] == ["3", "4", "6"]


def test_flickr30k_has_neither_folders_nor_coco_ids(tmp_path: Path) -> None:
    layouts.write_image(tmp_path / "1000092795.jpg", 0)
    sentences = [{"raw": "w1 w2"}, {"raw": "w3"}]
    image = {"filename": "1000092795.jpg", "split": "test", "sentences": sentences, "imgid": 0, "sentids": [0, 1]}
    file = layouts.write_json(tmp_path / "dataset_flickr30k.json", {"images": [image], "dataset": "flickr30k"})
    (query,) = read("karpathy", annotations=str(file), images=str(tmp_path)).queries
    assert (query.id, query.answers) == ("1000092795", ("w1 w2", "w3"))


def test_nocaps_has_scores_of_its_domains(tmp_path: Path) -> None:
    layouts.write_image(tmp_path / "a.jpg", 0)
    image = {"id": 0, "file_name": "a.jpg", "open_images_id": "a", "domain": "near-domain"}
    content = {"images": [image], "annotations": [{"id": 0, "image_id": 0, "caption": "w1"}]}
    file = layouts.write_json(tmp_path / "nocaps_val_4500_captions.json", content)
    (query,) = read("coco", annotations=str(file), images=str(tmp_path)).queries
    assert query.groups == ("domain/near-domain",)


def test_vqa(tmp_path: Path) -> None:
    data = read("vqa", **layouts.write_vqa(tmp_path))
    query = data.queries[1]
    assert (query.id, query.cluster, query.shown_answer) == ("2000", "1", "w2")
    assert query.answers == ("w2",) * 6 + ("w3",) * 4
    assert query.fields == {"question": "w2 w30"}
    assert query.groups == ("question_type/how many", "answer_type/other")
    assert query.medium == FileMedium(tmp_path / "val2014" / "COCO_val2014_000000000001.jpg")


def test_a_test_set_of_questions_has_no_answers(tmp_path: Path) -> None:
    values = layouts.write_vqa(tmp_path)
    del values["annotations"]
    data = read("vqa", **values)
    assert len(data.queries) == 6
    assert not any(query.answers for query in data.queries)
    assert data.results == "vqa"


@pytest.mark.parametrize(
    ("kind", "write", "identifier", "cluster"),
    [
        ("textvqa", layouts.write_textvqa, "0", "i0"),
        ("vizwiz", layouts.write_vizwiz, "VizWiz_val_00000000.jpg", "VizWiz_val_00000000.jpg"),
        ("gqa", layouts.write_gqa, "00", "0"),
    ],
)
def test_other_questions(
    tmp_path: Path, kind: str, write: Callable[[Path], dict[str, Any]], identifier: str, cluster: str
) -> None:
    query = read(kind, **write(tmp_path)).queries[0]
    assert (query.id, query.cluster) == (identifier, cluster)
    assert set(query.answers) == {"w0"}
    assert query.fields["question"].startswith("w30")


def test_a_class_is_the_place_of_its_sorted_folder(tmp_path: Path) -> None:
    data = read("image_folder", **layouts.write_classes(tmp_path))
    assert [query.id for query in data.queries][:3] == [
        *("n01440764/val_0.JPEG", "n01440764/val_1.JPEG", "n01443537/val_0.JPEG")
    ]
    assert data.queries[2].candidates == ("w1", "w2 w3", "w4")
    assert data.queries[2].answers == ("w2 w3",)
    lines = tmp_path / "names.txt"
    lines.write_text("w5\nw6\nw7\n")
    data = read("image_folder", images=str(tmp_path / "val"), class_names=str(lines))
    assert data.queries[0].candidates == ("w5", "w6", "w7")


def test_hateful_memes(tmp_path: Path) -> None:
    data = read("hateful_memes", **layouts.write_memes(tmp_path))
    assert [query.answers for query in data.queries] == [("no",), ("yes",)] * 3
    assert data.balanced
    assert data.queries[1].fields == {"text": "w1"}


def test_video_questions(tmp_path: Path) -> None:
    data = read("video_qa", **layouts.write_video_qa(tmp_path))
    assert data.queries[1].candidates == ("w1", "w2", "w3")
    assert data.queries[1].medium == FileMedium(tmp_path / "v1.mp4", "video")


def test_episodes_bring_their_demonstrations(tmp_path: Path) -> None:
    data = read("episodes", **layouts.write_episodes(tmp_path), stop_texts=["\n"])
    query = data.queries[0]
    assert [one.shown_answer for one in query.demonstrations or ()] == ["w1", "w2"]
    assert (query.exchange, query.other, query.answers, data.cut) == ((1, 0), "w2", ("w1",), ("\n",))


def test_pairs_of_shards_with_and_without_questions(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "0.tar", [("x", {"png": image_bytes(), "txt": b" a dog "})])
    data = read("shards", manifest=str(build_manifest(tmp_path / "a")))
    assert [(query.id, query.answers) for query in data.queries] == [("x", ("a dog",))]
    assert data.kind == "caption"
    asked = {"png": image_bytes(), "txt": b"dog", "prompt.txt": b"What?"}
    write_shard(tmp_path / "b" / "0.tar", [("x", asked)])
    write_shard(tmp_path / "b" / "1.tar", [("x", asked)])
    data = read("shards", manifest=str(build_manifest(tmp_path / "b")))
    assert [query.id for query in data.queries] == ["00000/x", "00001/x"]
    assert data.kind == "question"
    assert data.queries[0].fields == {"question": "What?"}


def test_documents_are_read_up_to_the_image_to_caption(tmp_path: Path) -> None:
    # image_info does not follow the order of the sentences.
    write_shard(tmp_path / "0.tar", [("d", mmc4(["one", "two", "three"], [2, 0, 1]))])
    manifest = build_manifest(tmp_path)
    (query,) = read("shards", manifest=str(manifest), samples="interleaved", image=2).queries
    assert query.answers == ("two",)
    assert [one.answers for one in query.demonstrations or ()] == [("one",)]
    decoder = MediaDecoder(ProcessorConfig(8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
    chunks = (*(query.demonstrations or ()), query)
    levels = [int(decoder.decode(one.medium).flatten()[0]) for one in chunks if one.medium is not None]
    assert levels == [20, 30]


def test_a_sample_that_cannot_be_used_is_a_fault(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a", {"png": image_bytes(), "txt": b"fine"}), ("b", {"png": b"no", "txt": b" "})])
    findings = Findings("tasks.0")
    read_task(ShardsTask(name="a", manifest=build_manifest(tmp_path)), findings)
    (problem,) = findings.problems
    assert problem.message.endswith("sample cannot be used (empty_text: the .txt has no visible character): b")
