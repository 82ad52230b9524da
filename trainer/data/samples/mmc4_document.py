"""Parse documents in MMC4's layout: ``text_list``, ``image_info`` and ``similarity_matrix``.

The sentence of an image is its ``matched_text_index``. If no image has one, the images are assigned to sentences one to
one so that the sum over ``similarity_matrix`` ([images, sentences]) is largest; with more images than sentences, the
images without a sentence are dropped.

The bytes of an image are ``image_base64`` or a member of the sample. Base64 may have line breaks, the alphabet of urls,
and the head of a data URI. ``image_name`` is the extension of the member (``doc.0.png`` is ``0.png`` of ``doc``) or its
full name.

An entry of ``image_info`` that cannot be used is left out where another one can.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import check_field, is_visible

_URL_ALPHABET = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class PlacedImage:
    """Hold an image and its place in the text.

    Attributes:
        sentence: Number of the sentence that the image stands before.
        info: Entry of ``image_info``.
    """

    sentence: int
    info: Mapping[str, Any]


Damaged = list[tuple[PlacedImage, SampleError]]


@dataclass(frozen=True)
class Document:
    """Hold a document whose images have their places.

    Attributes:
        sentences: Sentences in the order of ``text_list``.
        images: Images in the order of their sentences.
        dropped: Errors of the entries that were left out.
    """

    sentences: tuple[str, ...]
    images: tuple[PlacedImage, ...]
    dropped: tuple[SampleError, ...] = ()

    def without(self, damaged: Damaged) -> Document:
        """Return the document without images that cannot be used.

        Raises:
            SampleError: No image is left; the error is that of the last one.
        """
        gone = {id(image) for image, _ in damaged}
        images = tuple(image for image in self.images if id(image) not in gone)
        if not images:
            raise damaged[-1][1]
        return replace(self, images=images, dropped=(*self.dropped, *(error for _, error in damaged)))

    def cut(self, max_characters: int) -> Document:
        """Return the document up to its first ``max_characters`` characters.

        Raises:
            SampleError: filtered_max_document_characters: no image stands in that part.
        """
        if sum(map(len, self.sentences)) <= max_characters:
            return self
        sentences: list[str] = []
        room = max_characters
        for sentence in self.sentences:
            sentences.append(sentence[:room])
            room -= len(sentence)
            if room <= 0:
                break
        images = tuple(image for image in self.images if image.sentence < len(sentences))
        if not images:
            detail = f"no image in the first {max_characters:,} characters (max_document_characters)"
            raise SampleError("filtered_max_document_characters", detail)
        return replace(self, sentences=tuple(sentences), images=images)


def parse_document(content: Any, min_similarity: float | None = None) -> Document:
    """Check a decoded ``.json`` member and place its images.

    Args:
        content: Decoded JSON.
        min_similarity: Lowest similarity of an image to its sentence; None keeps all images.

    Raises:
        SampleError: invalid_document (another layout), empty_text, no_images, filtered_similarity. If no entry of
            image_info can be used: invalid_document, missing_match, match_out_of_range, missing_similarity.
    """
    sentences, infos = _fields(content)
    if not any(is_visible(sentence) for sentence in sentences):
        raise SampleError("empty_text", "text_list has no visible character")
    if not infos:
        raise SampleError("no_images", "image_info is empty")
    if not any(isinstance(info, dict) for info in infos):
        _check_entry(infos[0])
    if any(isinstance(info, dict) and info.get("matched_text_index") is not None for info in infos):
        placed, dropped = _matched(infos, len(sentences), min_similarity)
    else:
        placed, dropped = _assigned(content.get("similarity_matrix"), infos, len(sentences), min_similarity)
    if not placed:
        if dropped:
            raise dropped[-1]
        raise SampleError("filtered_similarity", f"no image reaches min_similarity = {min_similarity}")
    # The sort is stable: images of one sentence keep the order of image_info.
    return Document(tuple(sentences), tuple(sorted(placed, key=lambda image: image.sentence)), tuple(dropped))


def image_bytes(image: PlacedImage, members: Mapping[str, bytes], key: str) -> bytes:
    """Return the encoded image.

    Args:
        image: Image of the document.
        members: Members of the document's sample.
        key: Key of the sample.

    Raises:
        SampleError: missing_image, invalid_base64.
    """
    encoded = image.info.get("image_base64")
    if isinstance(encoded, str):
        return _decode_base64(encoded)
    name = image.info.get("image_name")
    if not isinstance(name, str):
        raise SampleError("missing_image", "an entry of image_info has neither image_name nor image_base64")
    key_prefix = key.rpartition("/")[2] + "."
    for candidate in (name, name.removeprefix(key_prefix)):
        # Extensions are lower-case, as webdataset makes them.
        if candidate.lower() in members:
            return members[candidate.lower()]
    raise SampleError("missing_image", f"no member {name!r}; members: {', '.join(sorted(members))}")


def _decode_base64(text: str) -> bytes:
    try:
        data = text.encode("ascii")
        if data[:5].lower() == b"data:":
            head, _, data = data.partition(b",")
            if not head.lower().endswith(b";base64"):
                raise SampleError("invalid_base64", "a data URI that is not base64")
            data = unquote_to_bytes(data)
        data = b"".join(data.split()).rstrip(b"=").translate(_URL_ALPHABET)
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("invalid_base64", str(error)) from error


def _fields(content: Any) -> tuple[list[str], list[Any]]:
    if not isinstance(content, dict):
        raise SampleError("invalid_document", "the json is not an object")
    sentences: Any = content.get("text_list")
    infos: Any = content.get("image_info")
    for name, value in (("text_list", sentences), ("image_info", infos)):
        check_field(name, value)
        if not isinstance(value, list):
            raise SampleError("invalid_document", f"{name} is not a list")
    for sentence in sentences:
        check_field("text_list", sentence)
        if not isinstance(sentence, str):
            raise SampleError("invalid_document", "text_list is not a list of strings")
    return sentences, infos


def _matched(
    infos: list[Any], num_sentences: int, min_similarity: float | None
) -> tuple[list[PlacedImage], list[SampleError]]:
    """Place each image at its ``matched_text_index``; return the errors of the images that cannot be used."""
    placed: list[PlacedImage] = []
    dropped: list[SampleError] = []
    for info in infos:
        try:
            _check_entry(info)
            image = PlacedImage(_sentence(info, num_sentences), info)
            if min_similarity is None or _similarity(info) >= min_similarity:
                placed.append(image)
        except SampleError as error:
            dropped.append(error)
    return placed, dropped


def _check_entry(info: Any) -> None:
    check_field("an entry of image_info", info)
    if not isinstance(info, dict):
        raise SampleError("invalid_document", "image_info is not a list of objects")


def _sentence(info: Mapping[str, Any], num_sentences: int) -> int:
    value = info.get("matched_text_index")
    if value is None:
        raise SampleError("missing_match", "some images have a matched_text_index, another has none")
    if isinstance(value, bool) or not isinstance(value, int):
        raise SampleError("invalid_document", f"matched_text_index is {value!r}")
    if not 0 <= value < num_sentences:
        raise SampleError("match_out_of_range", f"matched_text_index {value} of {num_sentences} sentences")
    return value


def _similarity(info: Mapping[str, Any]) -> float:
    value = info.get("matched_sim")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SampleError("missing_similarity", "min_similarity is set, but an image has no number matched_sim")
    return float(value)


def _assigned(
    matrix: Any, infos: list[Any], num_sentences: int, min_similarity: float | None
) -> tuple[list[PlacedImage], list[SampleError]]:
    """Place each image by ``similarity_matrix``; return the errors of the images that cannot be used."""
    placed: list[PlacedImage] = []
    dropped: list[SampleError] = []
    for info, (sentence, similarity) in zip(infos, _assign(matrix, len(infos), num_sentences), strict=True):
        try:
            _check_entry(info)
            if sentence is not None and (min_similarity is None or similarity >= min_similarity):
                placed.append(PlacedImage(sentence, info))
        except SampleError as error:
            dropped.append(error)
    return placed, dropped


def _assign(matrix: Any, num_images: int, num_sentences: int) -> list[tuple[int | None, float]]:
    """Assign images to sentences, and return (sentence, similarity) of each image."""
    if matrix is None:
        raise SampleError("missing_match", "neither matched_text_index nor similarity_matrix")
    try:
        similarity = np.array(matrix, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise SampleError("invalid_document", f"similarity_matrix: {error}") from error
    if similarity.shape != (num_images, num_sentences) or not np.isfinite(similarity).all():
        wanted = f"{num_images} images x {num_sentences} sentences"
        raise SampleError("invalid_document", f"similarity_matrix is {similarity.shape}, expected finite {wanted}")
    from scipy.optimize import linear_sum_assignment  # slow to import, rarely needed

    matches: list[tuple[int | None, float]] = [(None, 0.0)] * num_images
    for row, column in zip(*linear_sum_assignment(similarity, maximize=True), strict=True):
        matches[row] = (int(column), float(similarity[row, column]))
    return matches
