"""Read rows from tables as people have them: csv, tsv, JSON lines, JSON arrays and COCO's captions, zipped or not.

A row is a mapping from column to value. One bad row is a ``Refused``; the rows around it are read.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

from trainer.data.conversion.common import Refused
from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import decode_json
from trainer.data.shards.file_kinds import PROBE_BYTES, kind_of

Row = tuple[str, Any]  # where it stands, and the row or a Refused
_DELIMITERS = ",\t;|"
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
_BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile)


def table_rows(table: Path, wanted: Iterable[str] = ()) -> Iterator[Row]:
    """Yield (where, row) for every row of a table.

    Args:
        table: A file of one of the layouts above; its first bytes and its name say which.
        wanted: Columns that the header of a csv or tsv file should have; they decide between its possible delimiters.

    Raises:
        ValueError: The file is of another kind.
        OSError: The file cannot be read.
    """
    for name, file in _opened(table):
        start = file.peek(PROBE_BYTES)[:PROBE_BYTES]
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        suffixes = Path(name.removesuffix(".gz").removesuffix(".zip")).suffixes
        if text[:1] in (b"[", b"{"):
            rows = _json_rows(name, file, is_array=text[:1] == b"[", one_value=".json" in suffixes)
        elif _is_binary(start):
            raise ValueError(
                f"{name}: {kind_of(start) or 'a binary file'}; tables are read from .csv, .tsv, .jsonl and .json files"
            )
        elif any(suffix in _JSON_SUFFIXES for suffix in suffixes):
            rows = _json_lines(name, file)
        else:
            rows = _delimited_rows(name, file, start, tuple(wanted))
        yield from _until_broken(name, rows)


def json_lines(path: Path) -> Iterator[Row]:
    """Yield (where, value) for every line of a file, which may be zipped or compressed with gzip.

    Raises:
        ValueError: The file is of another kind.
        OSError: The file cannot be read.
    """
    for name, file in _opened(path):
        start = file.peek(PROBE_BYTES)[:PROBE_BYTES]
        if _is_binary(start):
            raise ValueError(f"{name}: {kind_of(start) or 'a binary file'}, not JSON lines")
        is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        lines = _json_rows(name, file, is_array=True, one_value=False) if is_array else _json_lines(name, file)
        yield from _until_broken(name, lines)


def _opened(path: Path) -> Iterator[tuple[str, io.BufferedReader]]:
    """Yield the name and content of a file, or of every file of a zip archive.

    Raises:
        ValueError: The archive cannot be unpacked.
    """
    with open(path, "rb") as file:
        kind = kind_of(file.peek(PROBE_BYTES))
        if kind == "a gzip file":
            with gzip.open(file) as content:
                yield str(path), io.BufferedReader(content)
        elif kind == "a zip archive":
            yield from _zipped(path, file)
        else:
            yield str(path), file


def _zipped(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, io.BufferedReader]]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = [one for one in archive.infolist() if not one.is_dir() and "__MACOSX" not in one.filename]
            for one in members:
                with archive.open(one) as content:
                    yield f"{path}/{one.filename}", io.BufferedReader(cast(io.RawIOBase, content))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, or encrypted
        raise ValueError(f"{path}: the zip archive cannot be read: {error}: unzip it with another program") from error


def _until_broken(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows up to a damaged place of a compressed file."""
    try:
        yield from rows
    except _BROKEN_ARCHIVE as error:
        yield name, Refused(name, "damaged_file", f"the compressed file breaks off: {error}")


def _is_binary(start: bytes) -> bool:
    return (b"\0" in start and not start.startswith((b"\xff\xfe", b"\xfe\xff"))) or start.startswith(b"PAR1")


def _json_lines(name: str, file: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{name}:{number}"
            yield where, _strict(where, line)


def _strict(where: str, data: bytes) -> Any:
    try:
        return decode_json(data)
    except SampleError as error:
        return Refused(where, error.reason, error.detail)


def _json_rows(name: str, file: io.BufferedReader, *, is_array: bool, one_value: bool) -> Iterator[Row]:
    """Yield the rows of a JSON file: lines, an array, or an object that holds them.

    Args:
        name: Name of the file.
        file: The file.
        is_array: Whether it begins with a bracket.
        one_value: Whether the name says that it is one value, not lines.
    """
    if not is_array and not one_value:
        yield from _json_lines(name, file)
        return
    text = file.read().decode("utf-8-sig", "surrogateescape").strip()
    if is_array:
        yield from _array_rows(name, text)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):
            raise ValueError(f"{name}: not JSON: {error}") from error
        yield from _json_lines(
            name, text.encode("utf-8", "surrogateescape").splitlines()
        )  # lines, in spite of its name
        return
    yield from _object_rows(name, value)


def _array_rows(name: str, text: str) -> Iterator[Row]:
    """Yield the entries of an array one by one, so that those before a damaged one are read."""
    decoder, position, number = json.JSONDecoder(), 1, 0
    while True:
        while position < len(text) and (text[position].isspace() or text[position] == ","):
            position += 1
        if text[position : position + 1] == "]":
            return
        where = f"{name}[{number}]"
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield where, Refused(where, "invalid_json", f"{error}; the rest of the file is not read")
            return
        yield where, _strict(where, text[position:end].encode("utf-8", "surrogateescape"))
        position, number = end, number + 1


def _object_rows(name: str, value: Mapping[str, Any]) -> Iterator[Row]:
    """Yield rows of an object: COCO's captions, Karpathy's splits, or captions by file name.

    Raises:
        ValueError: The object has another layout.
    """
    images = value.get("images")
    if isinstance(images, list) and isinstance(value.get("annotations"), list):
        yield from _coco_rows(name, images, value["annotations"])
    elif isinstance(images, list):
        for number, image in enumerate(images):
            sentences = image.get("sentences") if isinstance(image, dict) else None
            if not isinstance(sentences, list):
                raise ValueError(f"{name}: neither annotations nor sentences of the images; {_KNOWN_JSON}")
            folder, file = image.get("filepath"), image.get("filename")
            path = f"{folder}/{file}" if folder else file
            captions = [one.get("raw") for one in sentences if isinstance(one, dict)]
            yield f"{name}:images[{number}]", {"image": path, "caption": captions}
    elif value and all(isinstance(one, (str, list)) for one in value.values()):
        for file, caption in value.items():
            yield f"{name}[{file!r}]", {"image": file, "caption": caption}
    else:
        fields = ", ".join(repr(one) for one in list(value)[:10])
        raise ValueError(f"{name}: an object with {fields or 'no fields'}; {_KNOWN_JSON}")


_KNOWN_JSON = (
    "JSON is read as an array of rows, JSON lines, COCO's captions (images and annotations with a caption), or an "
    "object of captions by file name"
)


def _coco_rows(name: str, images: list[Any], annotations: list[Any]) -> Iterator[Row]:
    files = {one["id"]: one.get("file_name") for one in images if isinstance(one, dict) and "id" in one}
    if annotations and not any(isinstance(one, dict) and "caption" in one for one in annotations):
        raise ValueError(f"{name}: its annotations have no caption: take COCO's captions_*.json")
    for number, annotation in enumerate(annotations):
        where = f"{name}:annotations[{number}]"
        if not isinstance(annotation, dict) or "caption" not in annotation:
            yield where, Refused(where, "missing_text", "the annotation has no caption")
        elif (image := annotation.get("image_id")) not in files:
            yield where, Refused(where, "missing_image", f"no image has the id {image!r}")
        else:
            yield where, {"image": files[image], "caption": annotation["caption"], "image_id": image}


def _delimited_rows(name: str, file: io.BufferedReader, start: bytes, wanted: tuple[str, ...]) -> Iterator[Row]:
    """Yield (where, row) for every row of a csv or tsv file.

    Raises:
        ValueError: The file has no header.
    """
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    lines: Iterator[str] = iter(io.TextIOWrapper(file, encoding, "surrogateescape", newline=""))
    header = next((line for line in lines if line.strip()), None)
    if header is None:
        raise ValueError(f"{name}: the file is empty")
    delimiter, columns = _header_of(header, wanted)
    with _any_field_size():
        yield from _checked_rows(name, lines, delimiter, columns)


def _header_of(line: str, wanted: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the delimiter under which a header has most of the wanted columns, then most columns; and its columns."""
    headers = {one: [cell.strip() for cell in next(csv.reader([line], delimiter=one))] for one in _DELIMITERS}
    best = max(_DELIMITERS, key=lambda one: (len({*wanted} & {*headers[one]}), len(headers[one])))
    return best, headers[best]


def _checked_rows(name: str, lines: Iterator[str], delimiter: str, columns: list[str]) -> Iterator[Row]:
    first_line = 2
    while True:
        recent: list[str] = []
        reader = csv.reader(_noting(lines, recent), delimiter=delimiter)
        unclosed = None
        while unclosed is None:
            recent.clear()
            line = first_line
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                first_line += len(recent)
                where = f"{name}:{line}"
                yield where, Refused(where, "invalid_row", str(error))
                continue
            first_line += len(recent)
            where = f"{name}:{line}"
            if len(recent) > 1 and _is_unclosed(recent, delimiter):
                unclosed = recent[1:]
                yield where, Refused(where, "invalid_row", "a quote is opened and never closed")
            elif cells:
                yield where, _row_of(where, cells, columns)
        lines, first_line = chain(unclosed, lines), line + 1


def _noting(lines: Iterator[str], recent: list[str]) -> Iterator[str]:
    for line in lines:
        recent.append(line)
        yield line


def _is_unclosed(lines: list[str], delimiter: str) -> bool:
    """Tell whether a row runs to the end of the file because a quote of it is never closed."""
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "end of data" in str(error)
    return False


def _row_of(where: str, cells: list[str], columns: list[str]) -> dict[str, str] | Refused:
    if len(cells) > len(columns) and any(cell.strip() for cell in cells[len(columns) :]):
        detail = f"{len(cells)} cells for {len(columns)} columns: a caption with the delimiter in it has to be quoted"
        return Refused(where, "invalid_row", detail)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        return Refused(where, "invalid_utf8", error.reason)
    return dict(zip(columns, cells, strict=False))


@contextmanager
def _any_field_size() -> Iterator[None]:
    """Let csv read fields of any size: its limit of 131,072 characters is global."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
