"""Filter the samples of a source by text, metadata and headers, before any medium is decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.config.data_config import FilterConfig
from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import decode_json, text_member


def accepted_text(members: Mapping[str, bytes], filters: FilterConfig) -> str:
    """Return the ``.txt`` member of a sample whose text and metadata pass the filters.

    Raises:
        SampleError: As ``check_metadata``, ``text_member`` and ``check_text``.
    """
    check_metadata(members, filters)
    text = text_member(members)
    check_text(text, filters)
    return text


def check_text(text: str, filters: FilterConfig) -> None:
    """Filter by the number of characters and words.

    Raises:
        SampleError: filtered_min_characters, filtered_max_characters, filtered_min_words, filtered_max_words.
    """
    _check_range("characters", len(text), filters.min_characters, filters.max_characters)
    if filters.min_words is not None or filters.max_words is not None:
        _check_range("words", len(text.split()), filters.min_words, filters.max_words)


def _check_range(unit: str, value: int, low: int | None, high: int | None) -> None:
    if low is not None and value < low:
        raise SampleError(f"filtered_min_{unit}", f"{value} {unit} of text, filters.min_{unit} = {low}")
    if high is not None and value > high:
        raise SampleError(f"filtered_max_{unit}", f"{value} {unit} of text, filters.max_{unit} = {high}")


def needs_sizes(filters: FilterConfig) -> bool:
    """Return whether any filter needs the size of images or frames, so that headers have to be read."""
    return filters.min_side is not None or filters.max_aspect is not None


def check_size(width: int, height: int, filters: FilterConfig) -> None:
    """Filter by the size of an image or frame in pixels.

    Raises:
        SampleError: filtered_min_side, filtered_max_aspect.
    """
    short, long = sorted((width, height))
    if filters.min_side is not None and short < filters.min_side:
        raise SampleError("filtered_min_side", f"{width} x {height}, filters.min_side = {filters.min_side}")
    if filters.max_aspect is not None and long > filters.max_aspect * short:
        raise SampleError("filtered_max_aspect", f"{width} x {height}, filters.max_aspect = {filters.max_aspect}")


def check_metadata(members: Mapping[str, bytes], filters: FilterConfig) -> None:
    """Filter by the similarity and the language in the ``.json`` member.

    Raises:
        SampleError: filtered_similarity, filtered_language. If a filter is set and its field is missing: missing_json,
            missing_similarity, missing_language. As ``decode_json``.
    """
    if filters.min_similarity is None and not filters.languages:
        return
    if "json" not in members:
        raise SampleError("missing_json", f"filters need it; members: {', '.join(sorted(members))}")
    metadata = decode_json(members["json"], strict=False)
    if filters.min_similarity is not None:
        similarity = _field(metadata, filters.similarity_field)
        if isinstance(similarity, bool) or not isinstance(similarity, int | float) or not math.isfinite(similarity):
            raise SampleError("missing_similarity", f"no number {filters.similarity_field!r} in the .json")
        if similarity < filters.min_similarity:
            raise SampleError("filtered_similarity", f"{similarity}, filters.min_similarity = {filters.min_similarity}")
    if filters.languages:
        language = _field(metadata, filters.language_field)
        if not isinstance(language, str):
            raise SampleError("missing_language", f"no text {filters.language_field!r} in the .json")
        if language not in filters.languages:
            raise SampleError("filtered_language", f"{language!a}, filters.languages = {list(filters.languages)}")


def _field(metadata: Any, name: str) -> Any:
    return metadata.get(name) if isinstance(metadata, dict) else None
