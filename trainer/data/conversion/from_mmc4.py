"""Convert MMC4's documents and their image files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data.conversion.common import Converted, DocumentImages, Refused, Result, attempt
from trainer.data.conversion.tables import json_lines
from trainer.data.errors import SampleError


def mmc4_documents(tables: Iterable[Path], images: Path | None) -> Iterator[Result]:
    """Yield MMC4's documents, one for each line, with the image files that ``image_name`` names as members.

    Images in ``image_base64`` stay where they are. Missing images are removed from ``image_info`` and
    ``similarity_matrix``.

    Args:
        tables: Files of JSON lines, plain or zipped as MMC4 offers them (``docs_shard_0_v2.jsonl.zip``).
        images: Folder of the image files.
    """
    for table in tables:
        for where, document in json_lines(table):
            if isinstance(document, Refused):
                yield document
            else:
                yield attempt(where, _convert_document, document, images)


def _convert_document(document: Any, images: Path | None) -> Converted:
    if not isinstance(document, dict) or not isinstance(document.get("image_info"), list):
        raise SampleError("invalid_document", "no object with a list image_info")
    collected = DocumentImages()
    infos: list[Mapping[str, Any]] = []
    kept: list[int] = []
    for number, info in enumerate(document["image_info"]):
        if not isinstance(info, dict):
            raise SampleError("invalid_document", "image_info is not a list of objects")
        if not isinstance(info.get("image_base64"), str):
            extension = collected.add(len(infos), info.get("image_name"), images)
            if extension is None:
                continue
            info = {**info, "image_name": extension}
        infos.append(info)
        kept.append(number)
    if not infos:
        where = f"in {images}" if images is not None else "because --images FOLDER is not given"
        raise SampleError("no_images", f"none of the document's {len(document['image_info'])} images is there {where}")
    changed: dict[str, Any] = {"image_info": infos}
    matrix = document.get("similarity_matrix")
    if isinstance(matrix, list) and len(matrix) == len(document["image_info"]):
        changed["similarity_matrix"] = [matrix[number] for number in kept]
    content = json.dumps({**document, **changed}, ensure_ascii=False, allow_nan=False).encode()
    return Converted({**collected.members, "json": content}, tuple(collected.dropped))
