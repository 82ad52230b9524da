"""MMC4's documents: ``text_list``, ``image_info`` and ``similarity_matrix``, checked and in the order of the text.

An image's sentence is its ``matched_text_index``. Where no image has one, ``similarity_matrix`` ([images, sentences])
is solved for the best one-to-one assignment; images that get no sentence (there are more images than sentences) are
left out. An image's bytes are a member of the sample or ``image_base64``; ``image_name`` is the member's extension
(``doc.0.png`` is ``0.png`` of ``doc``) or its full name.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.errors import SampleError


@dataclass(frozen=True)
class PlacedImage:
    """An image that stands before ``sentence``; info is its entry of ``image_info``."""

    sentence: int
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """sentences as in ``text_list``; images in the order of their sentences."""

    sentences: tuple[str, ...]
    images: tuple[PlacedImage, ...]


def parse_document(content: Any, min_similarity: float | None = None) -> Document:
    """A decoded ``.json`` member as a document.

    Raises SampleError: invalid_document (not the layout), empty_text, no_images (or none similar enough),
    missing_match, match_out_of_range, missing_similarity.
    """
    sentences, infos = _fields(content)
    if not any(sentence.strip() for sentence in sentences):
        raise SampleError("empty_text", "text_list has no text")
    if not infos:
        raise SampleError("no_images", "image_info is empty")
    matches: list[tuple[int | None, float]]
    if any(info.get("matched_text_index") is not None for info in infos):
        matches = [(_sentence(info, len(sentences)), _similarity(info, min_similarity)) for info in infos]
    else:
        matches = _assign(content.get("similarity_matrix"), len(infos), len(sentences))
    placed = [
        PlacedImage(sentence, info)
        for info, (sentence, similarity) in zip(infos, matches, strict=True)
        if sentence is not None and (min_similarity is None or similarity >= min_similarity)
    ]
    if not placed:
        raise SampleError("no_images", f"no image reaches min_similarity = {min_similarity}")
    # A stable sort: images of one sentence keep the order of image_info.
    return Document(tuple(sentences), tuple(sorted(placed, key=lambda image: image.sentence)))


def image_bytes(image: PlacedImage, members: Mapping[str, bytes], key: str) -> bytes:
    """The encoded image. Raises SampleError: missing_image, invalid_base64."""
    encoded = image.info.get("image_base64")
    if isinstance(encoded, str):
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SampleError("invalid_base64", str(error)) from error
    name = image.info.get("image_name")
    if not isinstance(name, str):
        raise SampleError("missing_image", "an entry of image_info has neither image_name nor image_base64")
    own = key.rpartition("/")[2] + "."
    for candidate in (name, name.removeprefix(own)):
        # Extensions are lower-case, as webdataset makes them.
        if candidate.lower() in members:
            return members[candidate.lower()]
    raise SampleError("missing_image", f"no member {name!r}; members: {', '.join(sorted(members))}")


def _fields(content: Any) -> tuple[list[str], list[Mapping[str, Any]]]:
    if not isinstance(content, dict):
        raise SampleError("invalid_document", "the json is not an object")
    sentences, infos = content.get("text_list"), content.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise SampleError("invalid_document", "text_list is not a list of strings")
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise SampleError("invalid_document", "image_info is not a list of objects")
    return sentences, infos


def _sentence(info: Mapping[str, Any], sentences: int) -> int:
    value = info.get("matched_text_index")
    if value is None:
        raise SampleError("missing_match", "some images have a matched_text_index, another has none")
    if isinstance(value, bool) or not isinstance(value, int):
        raise SampleError("invalid_document", f"matched_text_index is {value!r}")
    if not 0 <= value < sentences:
        raise SampleError("match_out_of_range", f"matched_text_index {value} of {sentences} sentences")
    return value


def _similarity(info: Mapping[str, Any], wanted: float | None) -> float:
    value = info.get("matched_sim")
    if wanted is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SampleError("missing_similarity", "min_similarity is set, but an image has no matched_sim")
    return float(value)


def _assign(matrix: Any, images: int, sentences: int) -> list[tuple[int | None, float]]:
    """(sentence, similarity) of each image; the sum of similarities is the largest possible."""
    if matrix is None:
        raise SampleError("missing_match", "neither matched_text_index nor similarity_matrix")
    try:
        similarity = np.array(matrix, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise SampleError("invalid_document", f"similarity_matrix: {error}") from error
    if similarity.shape != (images, sentences) or not np.isfinite(similarity).all():
        wanted = f"{images} images x {sentences} sentences"
        raise SampleError("invalid_document", f"similarity_matrix is {similarity.shape}, expected {wanted}")
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # slow to import, rarely needed

    matches: list[tuple[int | None, float]] = [(None, 0.0)] * images
    for row, column in zip(*linear_sum_assignment(similarity, maximize=True), strict=True):
        matches[row] = (int(column), float(similarity[row, column]))
    return matches
