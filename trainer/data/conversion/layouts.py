"""Data sets in other layouts as samples: a folder of images and captions, MMC4's jsonl, OBELICS-style parquet.

Each function yields ``Converted`` samples and ``Refused`` inputs in an order that the input alone decides. Names that
come from the data are looked up inside the given folder and nowhere else. Images are copied as they are: what is wrong
with their bytes is found, counted and replaced in training.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.errors import SampleError
from trainer.data.samples.decode import IMAGE_EXTENSIONS, decode_json, decode_text

_STARTS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"))


@dataclass(frozen=True)
class Converted:
    """Members of one sample by extension. dropped: reasons for which images of it were left out."""

    members: Mapping[str, bytes]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """An input that gives no sample; ``where`` is a file, with a line or row."""

    where: str
    reason: str
    detail: str


Result = Converted | Refused


def folder_pairs(images: Path) -> Iterator[Result]:
    """Every image below a folder with the caption that lies beside it (``dog.jpg`` and ``dog.txt``)."""
    for path in sorted(images.rglob("*")):
        extension = path.suffix[1:].lower()
        if extension not in IMAGE_EXTENSIONS or not path.is_file():
            continue
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            yield Refused(str(path), "missing_text", f"no {caption.name}")
            continue
        yield _attempt(
            str(caption), lambda p=path, c=caption, e=extension: _pair(p.read_bytes(), e, c.read_bytes(), {})
        )


def table_pairs(table: Path, images: Path, image_column: str, caption_column: str) -> Iterator[Result]:
    """The rows of a csv or jsonl: an image by its path below ``images``, and its caption.

    Other columns become the sample's ``.json``, for filters. Raises ValueError when a column is not there at all.
    """
    rows = _csv_rows(table) if table.suffix.lower() == ".csv" else _json_lines(table)
    for where, row in rows:
        if isinstance(row, Refused):
            yield row
            continue
        missing = [name for name in (image_column, caption_column) if name not in row]
        if missing and table.suffix.lower() == ".csv":
            raise ValueError(f"{table} has no column {missing[0]!r}, but {', '.join(map(repr, row))}")
        yield _attempt(where, lambda row=row: _table_pair(row, images, image_column, caption_column))


def mmc4_documents(tables: Iterable[Path], images: Path | None) -> Iterator[Result]:
    """MMC4's documents, one a line, with the files of ``images`` that ``image_name`` names as members.

    Images that are not there are left out of ``image_info`` and ``similarity_matrix``; those in ``image_base64`` stay.
    """
    for table in tables:
        for where, document in _json_lines(table):
            if isinstance(document, Refused):
                yield document
            else:
                yield _attempt(where, lambda document=document: _mmc4_document(document, images))


def obelics_documents(tables: Iterable[Path], images: Path | None) -> Iterator[Result]:
    """Rows of parquet files with the lists ``texts`` and ``images``, of which one has something at each place.

    An image is bytes, a struct with ``bytes``, or a name: a file below ``images``, or a url whose SHA-256 (hexadecimal)
    is the name of a file there. In MMC4's layout, an image stands before the text that follows it.
    Raises ValueError when pyarrow is not installed or a column is missing.
    """
    try:
        from pyarrow import parquet  # an extra: only this conversion needs it
    except ImportError as error:
        raise ValueError("parquet is read with pyarrow: pip install 'flamingo-trainer[parquet]'") from error
    for table in tables:
        file = parquet.ParquetFile(table)
        missing = [name for name in ("texts", "images") if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{table} has no column {missing[0]!r}, but {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=["texts", "images"]):
            for row in batch.to_pylist():
                yield _attempt(f"{table}:{number}", lambda row=row: _obelics_document(row, images))
                number += 1


def _attempt(where: str, convert: Any) -> Result:
    try:
        converted: Converted = convert()
    except SampleError as error:
        return Refused(where, error.reason, error.detail)
    except OSError as error:
        return Refused(where, "unreadable", str(error))
    return converted


def _pair(image: bytes, extension: str, caption: bytes, more: Mapping[str, Any]) -> Converted:
    text = decode_text(caption).strip()
    if not text:
        raise SampleError("empty_text", "the caption is empty")
    members = {extension: image, "txt": text.encode()}
    if more:
        members["json"] = json.dumps(more, ensure_ascii=False, allow_nan=False).encode()
    return Converted(members)


def _table_pair(row: Mapping[str, Any], images: Path, image_column: str, caption_column: str) -> Converted:
    name, caption = row.get(image_column), row.get(caption_column)
    if not isinstance(name, str) or not isinstance(caption, str):
        raise SampleError("missing_text", f"{image_column!r} and {caption_column!r} have to be texts")
    path = _inside(images, name)
    extension = path.suffix[1:].lower()
    if extension not in IMAGE_EXTENSIONS:
        raise SampleError("unsupported_image", f"{name!a} has none of the extensions {', '.join(IMAGE_EXTENSIONS)}")
    more = {key: value for key, value in row.items() if key not in (image_column, caption_column)}
    return _pair(path.read_bytes(), extension, caption.encode(), more)


def _mmc4_document(document: Any, images: Path | None) -> Converted:
    if not isinstance(document, dict) or not isinstance(document.get("image_info"), list):
        raise SampleError("invalid_document", "no object with a list image_info")
    members: dict[str, bytes] = {}
    infos: list[Mapping[str, Any]] = []
    kept: list[int] = []
    dropped: list[str] = []
    for number, info in enumerate(document["image_info"]):
        if not isinstance(info, dict):
            raise SampleError("invalid_document", "image_info is not a list of objects")
        if not isinstance(info.get("image_base64"), str):
            try:
                data = _named_image(info.get("image_name"), images)
            except (SampleError, OSError) as error:
                dropped.append(getattr(error, "reason", "unreadable"))
                continue
            extension = f"{len(infos)}.{_extension(data)}"
            members[extension] = data
            info = {**info, "image_name": extension}
        infos.append(info)
        kept.append(number)
    if not infos:
        raise SampleError("no_images", f"none of {len(document['image_info'])} images is there")
    matrix = document.get("similarity_matrix")
    changed = {"image_info": infos}
    if isinstance(matrix, list) and len(matrix) == len(document["image_info"]):
        changed["similarity_matrix"] = [matrix[number] for number in kept]
    members["json"] = json.dumps({**document, **changed}, ensure_ascii=False, allow_nan=False).encode()
    return Converted(members, tuple(dropped))


def _obelics_document(row: Mapping[str, Any], images: Path | None) -> Converted:
    texts, places = row["texts"], row["images"]
    if not isinstance(texts, list) or not isinstance(places, list) or len(texts) != len(places):
        raise SampleError("invalid_document", "texts and images are not lists of one length")
    sentences: list[str] = []
    infos: list[dict[str, Any]] = []
    members: dict[str, bytes] = {}
    dropped: list[str] = []
    for text, image in zip(texts, places, strict=True):
        if text is not None and image is not None:
            raise SampleError("invalid_document", "a place has a text and an image")
        if text is not None:
            sentences.append(str(text))
        elif image is not None:
            try:
                data = _image_of(image, images)
            except (SampleError, OSError) as error:
                dropped.append(getattr(error, "reason", "unreadable"))
                continue
            extension = f"{len(infos)}.{_extension(data)}"
            members[extension] = data
            infos.append({"image_name": extension, "matched_text_index": len(sentences)})
    if not infos or not sentences:
        raise SampleError("empty_text" if infos else "no_images", f"{len(sentences)} texts, {len(infos)} images")
    if infos[-1]["matched_text_index"] == len(sentences):
        sentences.append("")  # images that no text follows still need a place to stand
    members["json"] = json.dumps({"text_list": sentences, "image_info": infos}, ensure_ascii=False).encode()
    return Converted(members, tuple(dropped))


def _image_of(value: Any, images: Path | None) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    return _named_image(value, images)


def _named_image(name: Any, images: Path | None) -> bytes:
    if not isinstance(name, str) or not name:
        raise SampleError("missing_image", "neither bytes nor a name")
    if images is None:
        raise SampleError("missing_image", "the images are files: say where with --images")
    if "://" in name:
        name = hashlib.sha256(name.encode()).hexdigest()
    return _inside(images, name).read_bytes()


def _inside(folder: Path, name: str) -> Path:
    """The file of that name below a folder. Raises SampleError: outside, missing_image."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise SampleError("outside", f"{name!a} lies outside {folder}")
        if not path.is_file():
            raise SampleError("missing_image", f"no file {name!a} in {folder}")
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise SampleError("missing_image", str(error)) from error
    return path


def _extension(image: bytes) -> str:
    """By the first bytes: names in the data lie, and urls have none."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((extension for start, extension in _STARTS if image.startswith(start)), "jpg")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield where, decode_json(line)
                except SampleError as error:
                    yield where, Refused(where, error.reason, error.detail)


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            try:
                "".join(value for value in row.values() if isinstance(value, str)).encode()
            except UnicodeEncodeError as error:
                yield where, Refused(where, "invalid_utf8", error.reason)
                continue
            yield where, {key: value for key, value in row.items() if key is not None and value is not None}
