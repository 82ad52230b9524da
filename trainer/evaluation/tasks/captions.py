"""Read captioning tasks: COCO's layout (also NoCaps) and Karpathy's splits (also Flickr30k)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trainer.config.evaluation_tasks import CocoTask, KarpathyTask
from trainer.evaluation.query import FileMedium, Query, TaskData
from trainer.evaluation.tasks.findings import Findings, Source


def read_coco(task: CocoTask, findings: Findings) -> TaskData:
    """Read ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``; NoCaps adds ``domain``."""
    queries = _read_coco(Source(findings, "annotations", task.annotations), "images", task.images)
    support: tuple[Query, ...] = ()
    if task.support_annotations is not None:
        source = Source(findings, "support_annotations", task.support_annotations)
        folder, setting = (task.images, "images") if task.support_images is None else (task.support_images, "")
        support = _read_coco(source, setting or "support_images", folder)
    return TaskData(queries, support, "caption", "cider", results="captions")


def _read_coco(source: Source, images_setting: str, folder: Path) -> tuple[Query, ...]:
    content = source.json_object("images", "annotations")
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in source.entries(content["annotations"], {"image_id": int, "caption": str}):
        captions[entry["image_id"]].append(entry["caption"].strip())
    is_new = source.unique("image id")
    queries = []
    for entry in source.entries(content["images"], {"id": int, "file_name": str}):
        number = entry["id"]
        texts = tuple(filter(None, captions.pop(number, ())))
        if not is_new(number):
            continue
        if not texts:
            source.fault("image has no caption", number)
            continue
        path = source.medium_path(images_setting, folder / entry["file_name"], number)
        domain = entry.get("domain")
        groups = (f"domain/{domain}",) if isinstance(domain, str) else ()
        queries.append(Query(str(number), str(number), FileMedium(path), texts, texts[0], groups=groups))
    for number in captions:
        source.fault("captions of an image that is not in the list", number)
    return tuple(queries)


def read_karpathy(task: KarpathyTask, findings: Findings) -> TaskData:
    """Read ``{"images": [{"filepath", "filename", "cocoid", "split", "sentences": [{"raw"}]}]}``.

    An image's id is its ``cocoid``, or the stem of its file name.
    """
    source = Source(findings, "annotations", task.annotations)
    entries = list(
        source.entries(source.json_object("images")["images"], {"filename": str, "split": str, "sentences": list})
    )
    splits = {entry["split"] for entry in entries}
    if entries and task.split not in splits:
        findings.add("split", task.annotations, f"has no split {task.split!r} (it has {', '.join(sorted(splits))})")
    is_new = source.unique("image id")
    queries = _of_splits(source, entries, (task.split,), task.images)
    support = _of_splits(source, entries, task.support_splits, task.images)
    for query in (*queries, *support):
        is_new(query.id)
    return TaskData(queries, support, "caption", "cider", results="captions")


def _of_splits(
    source: Source, entries: list[dict[str, Any]], splits: Collection[str], folder: Path
) -> tuple[Query, ...]:
    queries = []
    for entry in entries:
        if entry["split"] not in splits:
            continue
        name = entry["filename"]
        number = str(entry.get("cocoid", Path(name).stem))
        sentences = [one.get("raw") if isinstance(one, dict) else None for one in entry["sentences"]]
        texts = tuple(text.strip() for text in sentences if isinstance(text, str) and text.strip())
        if not texts:
            source.fault("image has no caption", number)
            continue
        path = source.medium_path("images", folder / str(entry.get("filepath", "")) / name, number)
        queries.append(Query(number, number, FileMedium(path), texts, texts[0]))
    return tuple(queries)
