"""Compute CIDEr with pycocoevalcap's own class, on tokens of our own rules instead of Java's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.evaluation.metrics.ptb_tokens import ptb_tokenize


def cider(references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Return the CIDEr-D of each caption, 0..10; the value of the set is their mean.

    Document frequencies are those of all references, so a caption's value depends on the whole set.

    Args:
        references: Right captions of each image.
        predictions: Caption of each image.

    Raises:
        ValueError: The images differ, or an image has no reference.
        ModuleNotFoundError: pycocoevalcap is not installed.
    """
    if references.keys() != predictions.keys():
        different = sorted(references.keys() ^ predictions.keys())
        raise ValueError(
            f"CIDEr: {len(different)} images have only a reference or only a caption, such as {different[0]!r}"
        )
    without = [name for name, captions in references.items() if not captions]
    if without:
        raise ValueError(f"CIDEr: {len(without)} images have no reference, such as {without[0]!r}")
    tokens = {name: [ptb_tokenize(caption) for caption in captions] for name, captions in references.items()}
    if not any(caption for captions in tokens.values() for caption in captions):
        return dict.fromkeys(references, 0.0)  # pycocoevalcap cannot count documents without words
    _, scores = _scorer().compute_score(tokens, {name: [ptb_tokenize(predictions[name])] for name in tokens})
    return {name: float(score) for name, score in zip(tokens, scores, strict=True)}


def _scorer() -> Any:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'CIDEr needs pycocoevalcap, which is not installed: pip install "flamingo-trainer[evaluation]"'
        ) from error
    return Cider()
