"""Hold the queries of a task and the media that they show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from trainer.data.samples.mmc4_document import image_bytes, parse_document
from trainer.data.samples.sample_members import decode_json, image_member
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader

Metric = Literal["exact", "cider", "vqa_accuracy", "top1", "roc_auc"]
Kind = Literal["caption", "question", "class", "meme", "plain", "episode"]


@dataclass(frozen=True)
class FileMedium:
    """Name the file of an image or of a video.

    Attributes:
        path: File.
        kind: What the file holds.
    """

    path: Path
    kind: Literal["image", "video"] = "image"

    @property
    def name(self) -> str:
        """Name for messages, and for the page of the report."""
        return str(self.path)

    def read(self) -> bytes:
        """Return the encoded medium.

        Raises:
            OSError: The file cannot be read.
        """
        return self.path.read_bytes()


@dataclass(frozen=True)
class ShardMedium:
    """Name an image in a shard.

    Attributes:
        manifest: Manifest of the shard.
        shard: Number of the shard.
        index: Place of the sample in the shard.
        image: Place of the image in a document; None for the only image of a pair.
    """

    manifest: Path
    shard: int
    index: int
    image: int | None = None
    kind: Literal["image"] = "image"

    @property
    def name(self) -> str:
        """Name for messages, and for the page of the report."""
        place = "" if self.image is None else f", image {self.image + 1}"
        return f"{self.manifest}: shard {self.shard}, sample {self.index}{place}"

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            SampleError: The sample has no such image.
            ShardError: The shard cannot be read.
        """
        key, members = open_reader(self.manifest).read(self.shard, self.index)
        if self.image is None:
            return image_member(members)
        document = parse_document(decode_json(members.get("json", b"")))
        return image_bytes(document.images[self.image], members, key)


@dataclass(frozen=True)
class BlankMedium:
    """Stand for an image of the color with which the tower's images are padded."""

    kind: Literal["blank"] = "blank"

    @property
    def name(self) -> str:
        """Name for messages, and for the page of the report."""
        return "blank image"


Medium = FileMedium | ShardMedium | BlankMedium


@lru_cache(maxsize=8)
def open_reader(manifest: Path) -> ShardReader:
    """Return a reader of a manifest's shards, which stays open."""
    return ShardReader(load_manifest(manifest))


@dataclass(frozen=True)
class Query:
    """Hold one question to the model, which is also a demonstration for others.

    Attributes:
        id: Unique name within the task.
        cluster: Name of the image; queries about one image are not independent.
        medium: Medium that the query shows; None for text alone.
        answers: Right answers; () where they are not known.
        shown_answer: Answer that a demonstration shows.
        fields: Texts that the prompt's context names, such as "question".
        before: Text before the medium.
        candidates: Answers that are ranked; None where the answer is generated.
        groups: Groups of queries with scores of their own, such as "question_type/color".
        demonstrations: Demonstrations that the query brings; None where they are drawn from a support set.
        exchange: For each own demonstration, the place whose image it shows under "exchanged_demonstrations".
        other: Answer that follows the exchange.
    """

    id: str
    cluster: str
    medium: Medium | None
    answers: tuple[str, ...]
    shown_answer: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    candidates: tuple[str, ...] | None = None
    groups: tuple[str, ...] = ()
    demonstrations: tuple[Query, ...] | None = None
    exchange: tuple[int, ...] | None = None
    other: str | None = None


@dataclass(frozen=True)
class TaskData:
    """Hold what the files of a task say.

    Attributes:
        queries: Queries in the order of the files.
        support: Demonstrations that can be drawn; () if there are none.
        kind: Kind of prompt.
        metric: Name of the main score.
        balanced: Whether demonstrations take turns between the answers.
        cut: Texts at which a generated answer is cut, beside those of the prompt.
        results: Layout of the file for EvalAI; None where there is none.
        all_ids: Ids of all queries of the files, also those that ``num_queries`` leaves out.
    """

    queries: tuple[Query, ...]
    support: tuple[Query, ...]
    kind: Kind
    metric: Metric
    balanced: bool = False
    cut: tuple[str, ...] = ()
    results: Literal["captions", "vqa", "vizwiz"] | None = None
    all_ids: tuple[str, ...] = ()
