"""Read this project's own layouts: shards of pairs and documents, and episodes with their own demonstrations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.evaluation_tasks import EpisodesTask, ShardsTask
from trainer.data.errors import DataError, SampleError
from trainer.data.samples.mmc4_document import image_bytes, parse_document
from trainer.data.samples.pair_rows import PROMPT_MEMBER
from trainer.data.samples.sample_members import decode_json, image_member, text_member
from trainer.evaluation.query import FileMedium, Query, ShardMedium, TaskData, open_reader
from trainer.evaluation.tasks.findings import Findings, Source


def read_shards(task: ShardsTask, findings: Findings) -> TaskData:
    """Read pairs, or documents up to the image whose text is generated."""
    source = Source(findings, "manifest", task.manifest)
    queries = tuple(_read_samples(source, task))
    support: tuple[Query, ...] = ()
    if task.support_manifest is not None:
        support = tuple(_read_samples(Source(findings, "support_manifest", task.support_manifest), task))
    if not queries and not findings:
        source.fault("has no samples")
    asks = any("question" in query.fields for query in queries)
    return TaskData(queries, support, "question" if asks else "caption", task.metric)


def _read_samples(source: Source, task: ShardsTask) -> Iterator[Query]:
    try:
        reader = open_reader(source.file)
        for shard, count in enumerate(reader.manifest.samples):
            for index in range(int(count)):
                key, members = reader.read(shard, index)
                place = ShardMedium(source.file, shard, index)
                # A key may stand in several shards.
                name = key if len(reader.manifest.samples) == 1 else f"{shard:05}/{key}"
                try:
                    if task.samples == "image_text":
                        yield _pair(name, members, place)
                    else:
                        yield _document(name, key, members, place, task.image)
                except SampleError as error:
                    source.fault(f"sample cannot be used ({error})", name)
    except (DataError, OSError, ValueError) as error:
        source.fault(f"cannot be read ({error})")


def _pair(name: str, members: dict[str, bytes], place: ShardMedium) -> Query:
    image_member(members)
    text = text_member(members)
    fields = {"question": text_member(members, PROMPT_MEMBER)} if PROMPT_MEMBER in members else {}
    return Query(name, name, place, (text,), text, fields)


def _document(name: str, key: str, members: dict[str, bytes], place: ShardMedium, image: int) -> Query:
    document = parse_document(decode_json(members.get("json", b"")))
    if len(document.images) < image:
        raise SampleError("no_images", f"it has {len(document.images)} images, but the task asks for image {image}")
    chunks = []
    for number, placed in enumerate(document.images[:image]):
        image_bytes(placed, members, key)
        text = document.sentences[placed.sentence].strip()
        chunks.append(Query(f"{name}#{number + 1}", name, replace(place, image=number), (text,), text))
    *before, last = chunks
    return replace(last, id=name, demonstrations=tuple(before))


def read_episodes(task: EpisodesTask, findings: Findings) -> TaskData:
    """Read lines with ``id``, ``demonstrations``, ``query`` and ``answers``."""
    source = Source(findings, "episodes", task.episodes)
    folder = task.episodes.parent if task.images is None else task.images
    is_new = source.unique("id")
    queries = []
    for number, entry in source.json_lines():
        name = entry.get("id", f"line {number}")
        try:
            query = _episode(source, str(name), entry, folder)
        except _EpisodeError as error:
            source.fault(str(error), name)
            continue
        if is_new(query.id):
            queries.append(query)
    if not queries and not findings:
        source.fault("has no episodes")
    ranked = {query.candidates is not None for query in queries}
    if len(ranked) > 1:
        source.fault("some episodes have candidates, others have none")
    return TaskData(tuple(queries), (), "episode", "exact", cut=task.stop_texts)


class _EpisodeError(ValueError):
    """Report an episode of another format."""


def _episode(source: Source, name: str, entry: dict[str, Any], folder: Path) -> Query:
    demonstrations = entry.get("demonstrations", [])
    if not isinstance(demonstrations, list):
        raise _EpisodeError("demonstrations is no list")
    cluster, group = entry.get("cluster", name), entry.get("group", {})
    if not isinstance(group, dict):
        raise _EpisodeError("group is no object")
    own = [_piece(source, f"{name}#{place + 1}", one, folder, name) for place, one in enumerate(demonstrations)]
    query = _piece(source, name, entry.get("query"), folder, str(cluster))
    candidates = _texts(entry, "candidates") if "candidates" in entry else None
    exchange = entry.get("exchange")
    if exchange is not None and not _is_exchange(exchange, own):
        raise _EpisodeError("exchange does not name a demonstration with an image for each demonstration")
    other = entry.get("other")
    if other is not None and not isinstance(other, str):
        raise _EpisodeError("other is no text")
    return replace(
        query,
        answers=_texts(entry, "answers"),
        candidates=candidates,
        groups=tuple(f"{key}/{value}" for key, value in group.items()),
        demonstrations=tuple(own),
        exchange=None if exchange is None else tuple(exchange),
        other=other,
        fields={"context": query.shown_answer},
        shown_answer="",
    )


def _piece(source: Source, name: str, piece: Any, folder: Path, cluster: str) -> Query:
    if not isinstance(piece, dict) or not piece.keys() <= {"before", "image", "text"}:
        raise _EpisodeError("a piece is not an object of before, image and text")
    before, image, text = (piece.get(key) for key in ("before", "image", "text"))
    if any(value is not None and not isinstance(value, str) for value in (before, image, text)):
        raise _EpisodeError("before, image or text is no text")
    medium = None if image is None else FileMedium(source.medium_path("episodes", folder / image, name))
    return Query(name, cluster, medium, (), text or "", before=before or "")


def _texts(entry: dict[str, Any], key: str) -> tuple[str, ...]:
    value = entry.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise _EpisodeError(f"{key} is no list of texts, or it is empty")
    return tuple(value)


def _is_exchange(value: Any, own: list[Query]) -> bool:
    if not isinstance(value, list) or len(value) != len(own):
        return False
    return all(type(place) is int and 0 <= place < len(own) and own[place].medium is not None for place in value)
