"""Convert a folder of images whose captions lie beside them or in a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.conversion.common import Converted, Refused, Result, attempt, file_inside
from trainer.data.conversion.tables import table_rows
from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import IMAGE_EXTENSIONS, decode_text

# Columns that are taken where none is chosen, the first one that a table has.
IMAGE_COLUMNS = (
    *("image", "file_name", "filename", "filepath", "image_path", "image_file", "image_name", "path", "file"),
    *("img", "img_path"),
)
_ROWS_WITHOUT_COLUMNS = 100  # after so many rows the whole table lacks them
CAPTION_COLUMNS = ("caption", "text", "title", "sentence", "description", "captions", "prompt", "alt_text", "alt")


def folder_pairs(images: Path) -> Iterator[Result]:
    """Yield every image below a folder with the caption beside it (``dog.jpg`` and ``dog.txt``).

    Links to folders, and links that lead out of the folder, are refused.
    """
    base = images.resolve()
    for path in sorted(images.rglob("*")):
        extension = path.suffix[1:].lower()
        if path.is_symlink() and path.is_dir():
            detail = "a link to a folder is not followed: convert that folder itself, or copy it into this one"
            yield Refused(str(path), "link", detail)
            continue
        if extension not in IMAGE_EXTENSIONS or not path.is_file():
            continue
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            yield Refused(str(path), "missing_text", f"no {caption.name}")
            continue
        outside = [one for one in (path, caption) if one.is_symlink() and not one.resolve().is_relative_to(base)]
        if outside:
            yield Refused(str(outside[0]), "link", f"a link out of {images} is not followed: copy the file")
            continue
        yield attempt(str(caption), _convert_files, path, extension, caption)


def table_pairs(
    table: Path, images: Path, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[Result]:
    """Yield an image and its caption for every row of a table; a row with a list of captions gives several pairs.

    Args:
        table: See ``table_rows``.
        images: Folder of the images.
        image_column: Column with an image's path below ``images``; None takes the first of ``IMAGE_COLUMNS``.
        caption_column: Column with the caption; None takes the first of ``CAPTION_COLUMNS``. All other columns go into
            the sample's ``json``, for filters.

    Raises:
        ValueError: None of the first rows has the columns; the message lists those of the first one.
    """
    chosen: tuple[str, str] | None = None
    first: Mapping[str, Any] | None = None
    without = 0
    wanted = [one for one in (image_column, caption_column) if one] or [*IMAGE_COLUMNS, *CAPTION_COLUMNS]
    for where, row in table_rows(table, wanted):
        if isinstance(row, Refused):
            yield row
            continue
        if not isinstance(row, dict):
            yield Refused(where, "invalid_row", f"a row has to be an object, not {type(row).__name__}")
            continue
        first = first or row
        chosen = chosen or _choose_columns(table, row, image_column, caption_column)
        if chosen is None:
            yield Refused(where, "missing_text", f"no image or no caption: it has {', '.join(map(repr, row))}")
            without += 1
            if without >= _ROWS_WITHOUT_COLUMNS:
                break
            continue
        captions = row.get(chosen[1])
        for caption in captions if isinstance(captions, list) and captions else [captions]:
            yield attempt(where, _convert_row, {**row, chosen[1]: caption}, images, *chosen)
    if chosen is None and first is not None:
        raise _columns_missing(table, first, image_column, caption_column)


def _choose_columns(
    table: Path, row: Mapping[str, Any], image_column: str | None, caption_column: str | None
) -> tuple[str, str] | None:
    """Return the columns of image and caption, and print those that nobody named; None if the row lacks one."""
    image = _column(row, image_column, IMAGE_COLUMNS)
    caption = _column(row, caption_column, CAPTION_COLUMNS)
    if image is None or caption is None:
        return None
    if image_column is None or caption_column is None:
        print(f"{table}: images from the column {image!r}, captions from {caption!r}", file=sys.stderr)
    return image, caption


def _columns_missing(
    table: Path, row: Mapping[str, Any], image_column: str | None, caption_column: str | None
) -> ValueError:
    image_is_missing = _column(row, image_column, IMAGE_COLUMNS) is None
    missing = (image_column or "image") if image_is_missing else (caption_column or "caption")
    hint = ""
    if any(Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS for name in row):
        hint = "; its first line looks like a row: put a line with the names of the columns before it"
    return ValueError(
        f"{table} has no column {missing!r}, but {', '.join(map(repr, row))}; choose with --image-column and "
        f"--caption-column{hint}"
    )


def _column(row: Mapping[str, Any], chosen: str | None, known: Sequence[str]) -> str | None:
    if chosen is not None:
        return chosen if chosen in row else None
    by_name = {str(name).lower(): name for name in reversed(list(row))}
    return next((by_name[name] for name in known if name in by_name), None)


def _convert_files(image: Path, extension: str, caption: Path) -> Converted:
    return _make_pair(image.read_bytes(), extension, caption.read_bytes(), {})


def _make_pair(image: bytes, extension: str, caption: bytes, metadata: Mapping[str, Any]) -> Converted:
    text = decode_text(caption).strip()
    if not text:
        raise SampleError("empty_text", "the caption is empty")
    members = {extension: image, "txt": text.encode()}
    if metadata:
        try:
            members["json"] = json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # NaN, or a surrogate
            raise SampleError("invalid_json", f"the row cannot be stored: {error}") from error
    return Converted(members)


def _convert_row(row: Mapping[str, Any], images: Path, image_column: str, caption_column: str) -> Converted:
    name, caption = row.get(image_column), row.get(caption_column)
    if not isinstance(name, str) or not isinstance(caption, str):
        raise SampleError("missing_text", f"{image_column!r} and {caption_column!r} have to be texts")
    path = file_inside(images, name)
    extension = path.suffix[1:].lower()
    if extension not in IMAGE_EXTENSIONS:
        raise SampleError("unsupported_image", f"{name!a} has none of the extensions {', '.join(IMAGE_EXTENSIONS)}")
    metadata = {key: value for key, value in row.items() if key not in (image_column, caption_column)}
    return _make_pair(path.read_bytes(), extension, caption.encode(), metadata)
