"""Read tasks whose answers are ranked: folders of images by class, Hateful Memes, questions about videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.evaluation_tasks import HatefulMemesTask, ImageFolderTask, VideoQaTask
from trainer.data.samples.sample_members import IMAGE_EXTENSIONS
from trainer.evaluation.query import FileMedium, Query, TaskData
from trainer.evaluation.tasks.findings import Findings, Source


def read_image_folder(task: ImageFolderTask, findings: Findings) -> TaskData:
    """Read ``CLASS/IMAGE`` below a folder; the number of a class is the place of its folder among the sorted ones."""
    names = _class_names(task, findings)
    queries = tuple(_read_classes(Source(findings, "images", task.images), names))
    support: tuple[Query, ...] = ()
    if task.support_images is not None:
        support = tuple(_read_classes(Source(findings, "support_images", task.support_images), names))
    return TaskData(queries, support, "class", "top1", balanced=task.balanced)


def _folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def _class_names(task: ImageFolderTask, findings: Findings) -> dict[str, str]:
    """Return the name of each class by its folder."""
    folders = _folders(task.images)
    if not folders:
        findings.add("images", task.images, "has no folder of a class")
    if task.class_names is None:
        return {folder: folder for folder in folders}
    source = Source(findings, "class_names", task.class_names)
    names = _names_by_folder(source, folders)
    for folder in folders:
        if not names.get(folder):
            source.fault("class has no name", folder)
    named = {folder: names[folder] for folder in folders if names.get(folder)}
    is_new = source.unique("class name")
    for name in named.values():
        is_new(name)
    return named


def _names_by_folder(source: Source, folders: list[str]) -> dict[str, str]:
    """Read ``{FOLDER: NAME}``, Keras' ``{NUMBER: [FOLDER, NAME]}``, or a text file with a name a line."""
    if source.file.suffix == ".json":
        content = source.json_object()
        listed = [pair for pair in content.values() if isinstance(pair, list) and len(pair) == 2]
        names = dict(listed) if listed else content
        return {str(folder): str(name).replace("_", " ").strip() for folder, name in names.items()}
    try:
        lines = [line.strip() for line in source.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        source.fault(f"cannot be read ({error})")
        return {}
    if len(lines) != len(folders):
        source.fault(f"has {len(lines)} names for {len(folders)} folders")
    return dict(zip(folders, lines, strict=False))


def _read_classes(source: Source, names: dict[str, str]) -> Iterator[Query]:
    candidates = tuple(names.values())
    for folder in _folders(source.file):
        if folder not in names:
            source.fault("class is not among those of the queries", folder)
            continue
        files = sorted(path for path in (source.file / folder).iterdir() if _is_image(path))
        if not files:
            source.fault("class has no image", folder)
        for path in files:
            number, name = f"{folder}/{path.name}", names[folder]
            yield Query(number, number, FileMedium(path), (name,), name, candidates=candidates)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def read_hateful_memes(task: HatefulMemesTask, findings: Findings) -> TaskData:
    """Read lines ``{"id", "img", "label": 0 or 1, "text"}``."""
    queries = tuple(_read_memes(Source(findings, "annotations", task.annotations), task.images))
    support: tuple[Query, ...] = ()
    if task.support_annotations is not None:
        support = tuple(_read_memes(Source(findings, "support_annotations", task.support_annotations), task.images))
    if queries and len({query.shown_answer for query in queries}) == 1:
        findings.add("annotations", task.annotations, "has one label only, so there is no ROC-AUC")
    return TaskData(queries, support, "meme", "roc_auc", balanced=task.balanced)


def _read_memes(source: Source, folder: Path) -> Iterator[Query]:
    is_new = source.unique("id")
    lines = [entry for _, entry in source.json_lines()]
    for entry in source.entries(lines, {"id": (int, str), "img": str, "text": str}):
        number = str(entry["id"])
        if not is_new(number):
            continue
        if entry.get("label") not in (0, 1):
            source.fault("label is not 0 or 1", number)
            continue
        answer = "yes" if entry["label"] else "no"
        medium = FileMedium(source.medium_path("images", folder / entry["img"], number))
        fields = {"text": entry["text"].strip()}
        yield Query(number, entry["img"], medium, (answer,), answer, fields, candidates=("yes", "no"))


def read_video_qa(task: VideoQaTask, findings: Findings) -> TaskData:
    """Read ``[{"question", "answer", "video" or "video_id", "choices"}]``."""
    known = _known_answers(task, findings)
    queries = tuple(_read_videos(Source(findings, "annotations", task.annotations), "videos", task.videos, known))
    support: tuple[Query, ...] = ()
    if task.support_annotations is not None:
        setting, videos = "videos", task.videos
        if task.support_videos is not None:
            setting, videos = "support_videos", task.support_videos
        source = Source(findings, "support_annotations", task.support_annotations)
        found = _read_videos(source, setting, videos, known, is_support=True)
        support = tuple(found)
    return TaskData(queries, support, "question", "top1")


def _known_answers(task: VideoQaTask, findings: Findings) -> tuple[str, ...]:
    if task.answers is None:
        return ()
    try:
        lines = task.answers.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        findings.add("answers", task.answers, f"cannot be read ({error})")
        return ()
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _read_videos(
    source: Source, setting: str, videos: Path, known: tuple[str, ...], *, is_support: bool = False
) -> Iterator[Query]:
    is_new = source.unique("question id")
    listed = [
        {"_id": entry.get("question_id", entry.get("id", place)), **entry} if isinstance(entry, dict) else entry
        for place, entry in enumerate(source.json_list())
    ]
    for entry in source.entries(listed, {"question": str, "answer": str}):
        number, video = str(entry["_id"]), entry.get("video", entry.get("video_id"))
        if not is_new(number):
            continue
        if not isinstance(video, str | int):
            source.fault("question names no video", number)
            continue
        candidates = _choices(entry.get("choices")) or known
        answer = entry["answer"].strip()
        if not candidates and not is_support:
            source.fault("question has no choices, and the setting answers names no file", number)
        elif answer not in candidates and not is_support:
            # A closed list leaves some answers out; such a question counts as wrong, as in the paper.
            if "choices" in entry:
                source.fault("answer is not among the choices", number)
        path = source.medium_path(setting, source.formatted(setting, videos, video=video), number, "video")
        query = Query(number, str(video), FileMedium(path, "video"), (answer,), answer)
        yield replace(query, fields={"question": entry["question"].strip()}, candidates=candidates or None)


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        return ()
    texts = [one.get("choice") if isinstance(one, dict) else one for one in value]
    return tuple(dict.fromkeys(text.strip() for text in texts if isinstance(text, str)))
