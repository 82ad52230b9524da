"""Convert OBELICS-style parquet files into documents in MMC4's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data.conversion.common import Converted, DocumentImages, Result, attempt
from trainer.data.errors import SampleError
from trainer.data.shards.file_kinds import PROBE_BYTES, kind_of


def obelics_documents(tables: Iterable[Path], images: Path | None) -> Iterator[Result]:
    """Yield a document for each row.

    A row has the lists ``texts`` and ``images`` of equal length. At each place, at most one of them has an entry. An
    image is bytes, a struct with ``bytes``, or a name: a file below ``images``, or a url whose SHA-256 (hexadecimal)
    is the name of such a file. The document matches each image with the text that follows it.

    Args:
        tables: Parquet files.
        images: Folder of the image files.

    Raises:
        ValueError: pyarrow is not installed, or a column is missing.
    """
    try:
        from pyarrow import parquet  # optional: only this conversion needs it
    except ImportError as error:
        raise ValueError("parquet is read with pyarrow: pip install 'flamingo-trainer[parquet]'") from error
    for table in tables:
        file = _opened(table, parquet.ParquetFile)
        missing = [name for name in ("texts", "images") if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{table} has no column {missing[0]!r}, but {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=["texts", "images"]):
            for row in batch.to_pylist():
                yield attempt(f"{table}:{number}", _convert_row, row, images)
                number += 1


def _opened(table: Path, open_parquet: Callable[[Path], Any]) -> Any:
    try:
        return open_parquet(table)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own errors are among them
        with open(table, "rb") as file:
            kind = kind_of(file.read(PROBE_BYTES))
        found = f"{kind}, not a parquet file" if kind not in (None, "a parquet file") else f"damaged: {error}"
        raise ValueError(f"{table}: {found}") from error


def _convert_row(row: Mapping[str, Any], images: Path | None) -> Converted:
    texts, places = row["texts"], row["images"]
    if not isinstance(texts, list) or not isinstance(places, list) or len(texts) != len(places):
        raise SampleError("invalid_document", "texts and images are not lists of one length")
    collected = DocumentImages()
    sentences: list[str] = []
    infos: list[dict[str, Any]] = []
    for text, image in zip(texts, places, strict=True):
        if text is not None and image is not None:
            raise SampleError("invalid_document", "a place has a text and an image")
        if text is not None:
            sentences.append(str(text))
        elif image is not None:
            if isinstance(image, dict):
                image = image.get("bytes") or image.get("path")
            extension = collected.add(len(infos), image, images)
            if extension is not None:
                infos.append({"image_name": extension, "matched_text_index": len(sentences)})
    if not infos or not sentences:
        hint = "; images that are files need --images FOLDER" if images is None and not infos else ""
        found = f"{len(sentences)} texts, {len(infos)} images{hint}"
        raise SampleError("empty_text" if infos else "no_images", found)
    if infos[-1]["matched_text_index"] == len(sentences):
        sentences.append("")  # no text follows the last images, so they are matched with an empty one
    content = json.dumps({"text_list": sentences, "image_info": infos}, ensure_ascii=False).encode()
    return Converted({**collected.members, "json": content}, tuple(collected.dropped))
