"""Read questions about images: VQAv2's layout (also OK-VQA), TextVQA, VizWiz and GQA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.evaluation_tasks import GqaTask, TextVqaTask, VizWizTask, VqaTask
from trainer.evaluation.query import FileMedium, Query, TaskData
from trainer.evaluation.tasks.findings import Findings, Source, Types

_ID = (int, str)


def read_vqa(task: VqaTask, findings: Findings) -> TaskData:
    """Read VQAv2's questions and annotations, which belong together by ``question_id``."""
    images = ("images", task.images)
    queries = _read_vqa(findings, "", task.questions, task.annotations, images)
    support: tuple[Query, ...] = ()
    if task.support_questions is not None and task.support_annotations is not None:
        if task.support_images is not None:
            images = ("support_images", task.support_images)
        support = _read_vqa(findings, "support_", task.support_questions, task.support_annotations, images)
    return TaskData(queries, support, "question", "vqa_accuracy", results="vqa")


def _read_vqa(
    findings: Findings, prefix: str, questions: Path, annotations: Path | None, images: tuple[str, Path]
) -> tuple[Query, ...]:
    source = Source(findings, f"{prefix}questions", questions)
    answers = None if annotations is None else _annotations(Source(findings, f"{prefix}annotations", annotations))
    types: Types = {"question_id": _ID, "image_id": _ID, "question": str}
    is_new = source.unique("question id")
    queries = []
    for entry in source.entries(source.json_object("questions")["questions"], types):
        number = entry["question_id"]
        if not is_new(number):
            continue
        annotation: dict[str, Any] = {}
        if answers is not None:
            if number not in answers:
                source.fault("question has no annotation", number)
                continue
            annotation = answers.pop(number)
            if annotation["image_id"] != entry["image_id"]:
                source.fault("question and annotation name different images", number)
        path = source.formatted(images[0], images[1], image_id=entry["image_id"])
        medium = FileMedium(source.medium_path(images[0], path, number))
        groups = tuple(
            f"{name}/{annotation[name]}"
            for name in ("question_type", "answer_type")
            if isinstance(annotation.get(name), str)
        )
        fields = {"question": entry["question"].strip()}
        texts = tuple(annotation.get("texts", ()))
        shown = annotation.get("multiple_choice_answer") or most_common(texts)
        queries.append(
            Query(str(number), str(entry["image_id"]), medium, texts, str(shown), fields=fields, groups=groups)
        )
    for number in answers or ():
        source.fault("annotation has no question", number)
    return tuple(queries)


def _annotations(source: Source) -> dict[object, dict[str, Any]]:
    """Return the annotations by question id, each with its answers as ``texts``."""
    found: dict[object, dict[str, Any]] = {}
    is_new = source.unique("question id")
    types: Types = {"question_id": _ID, "image_id": _ID, "answers": list}
    for entry in source.entries(source.json_object("annotations")["annotations"], types):
        number = entry["question_id"]
        if is_new(number):
            found[number] = {**entry, "texts": _answers(source, entry["answers"], number)}
    return found


def _answers(source: Source, answers: list[Any], identifier: object) -> list[str]:
    """Return the texts of ``[{"answer"}]`` or of a list of texts; none at all is a finding."""
    texts = [one.get("answer") if isinstance(one, dict) else one for one in answers]
    if not texts:
        source.fault("list of answers is empty", identifier)
    elif not all(isinstance(text, str) for text in texts):
        source.fault("answers are no texts", identifier)
    return [str(text) for text in texts]


def most_common(texts: tuple[str, ...]) -> str:
    """Return the most common text, the first one among equals; "" if there is none."""
    return Counter(texts).most_common(1)[0][0] if texts else ""


def read_textvqa(task: TextVqaTask, findings: Findings) -> TaskData:
    """Read ``{"data": [{"question_id", "image_id", "question", "answers": [10 texts]}]}``."""
    files = (("annotations", task.annotations), ("support_annotations", task.support_annotations))
    folders = (("images", task.images), _support_images(task.images, task.support_images))
    queries, support = (
        _read_textvqa(Source(findings, setting, file), *images) if file is not None else ()
        for (setting, file), images in zip(files, folders, strict=True)
    )
    return TaskData(queries, support, "question", "vqa_accuracy", results="vqa")


def _support_images(images: Path, support: Path | None) -> tuple[str, Path]:
    return ("images", images) if support is None else ("support_images", support)


def _read_textvqa(source: Source, setting: str, images: Path) -> tuple[Query, ...]:
    queries = []
    is_new = source.unique("question id")
    types: Types = {"question_id": _ID, "image_id": _ID, "question": str}
    for entry in source.entries(source.json_object("data")["data"], types):
        number, image = entry["question_id"], str(entry["image_id"])
        if is_new(number):
            path = source.medium_path(setting, source.formatted(setting, images, image_id=image), number)
            queries.append(_question(source, str(number), image, path, entry))
    return tuple(queries)


def _question(source: Source, number: str, image: str, path: Path, entry: dict[str, Any]) -> Query:
    """Return the query of an entry with ``question`` and ``answers``; a test set has no answers at all."""
    texts = tuple(_answers(source, entry["answers"], number)) if isinstance(entry.get("answers"), list) else ()
    fields = {"question": entry["question"].strip()}
    return Query(number, image, FileMedium(path), texts, most_common(texts), fields=fields)


def read_vizwiz(task: VizWizTask, findings: Findings) -> TaskData:
    """Read ``[{"image", "question", "answers": [{"answer"}], "answer_type"}]``; an image has one question."""
    support: tuple[Query, ...] = ()
    if task.support_annotations is not None:
        source = Source(findings, "support_annotations", task.support_annotations)
        support = tuple(_read_vizwiz(source, *_support_images(task.images, task.support_images)))
    queries = tuple(_read_vizwiz(Source(findings, "annotations", task.annotations), "images", task.images))
    return TaskData(queries, support, "question", "vqa_accuracy", results="vizwiz")


def _read_vizwiz(source: Source, setting: str, folder: Path) -> Iterator[Query]:
    is_new = source.unique("image")
    for entry in source.entries(source.json_list(), {"image": str, "question": str}):
        image = entry["image"]
        if not is_new(image):
            continue
        query = _question(source, image, image, source.medium_path(setting, folder / image, image), entry)
        kind = entry.get("answer_type")
        groups = (f"answer_type/{kind}",) if isinstance(kind, str) else ()
        yield Query(query.id, image, query.medium, query.answers, query.shown_answer, query.fields, groups=groups)


def read_gqa(task: GqaTask, findings: Findings) -> TaskData:
    """Read ``{QUESTION_ID: {"imageId", "question", "answer", "types": {"structural"}}}``."""
    support: tuple[Query, ...] = ()
    if task.support_questions is not None:
        source = Source(findings, "support_questions", task.support_questions)
        support = tuple(_read_gqa(source, *_support_images(task.images, task.support_images)))
    queries = tuple(_read_gqa(Source(findings, "questions", task.questions), "images", task.images))
    return TaskData(queries, support, "question", "exact")


def _read_gqa(source: Source, setting: str, images: Path) -> Iterator[Query]:
    content = source.json_object()
    listed = [{**entry, "id": number} if isinstance(entry, dict) else entry for number, entry in content.items()]
    for entry in source.entries(listed, {"imageId": str, "question": str, "answer": str}):
        number, image, answer = entry["id"], entry["imageId"], entry["answer"].strip()
        if not answer:
            source.fault("answer is empty", number)
        path = source.medium_path(setting, source.formatted(setting, images, image_id=image), number)
        kind = entry["types"].get("structural") if isinstance(entry.get("types"), dict) else None
        groups = (f"structural/{kind}",) if isinstance(kind, str) else ()
        fields = {"question": entry["question"].strip()}
        yield Query(number, image, FileMedium(path), (answer,), answer, fields, groups=groups)
