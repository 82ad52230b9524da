"""Test that RICES finds the most similar images, and caches their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.builders import random_media, tiny_flamingo
from trainer.evaluation.retrieval import media_features, most_similar


@dataclass
class Decoder:
    """Take numbers for media."""

    media: Tensor = field(default_factory=lambda: random_media(6))

    def stack(self, media: Sequence[Any]) -> tuple[Tensor, None]:
        return self.media[list(media)], None


def test_the_most_similar_stands_last() -> None:
    support = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]), dim=1)
    found = most_similar(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), support, 3)
    assert found[:, 1:].tolist() == [[2, 0], [2, 1]]
    generator = torch.Generator().manual_seed(0)
    queries, supports = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (30, 200)
    )
    assert most_similar(queries, supports, 5).tolist() == (queries @ supports.T).topk(5).indices.flip(1).tolist()
    assert most_similar(queries[:1], supports, 5).tolist() == most_similar(queries, supports, 5)[:1].tolist()


def test_few_supports_and_bad_features_are_errors() -> None:
    features = torch.ones(3, 2)
    assert most_similar(features, features, 0).shape == (3, 0)
    with pytest.raises(ValueError, match="needs 4 images, but the training set has 3"):
        most_similar(features, features, 4)
    with pytest.raises(ValueError, match="dtype float32"):
        most_similar(features * torch.nan, features, 1)


def test_features_are_cached_by_tower_and_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoder, runs = tiny_flamingo(), Decoder(), []
    forward = model.vision_encoder.forward
    monkeypatch.setattr(model.vision_encoder, "forward", lambda *args: (runs.append(1), forward(*args))[1])
    first: Any = media_features(model, decoder, [0, 1, 2, 1], tmp_path)  # type: ignore[list-item]
    assert len(runs) == 3  # two are one image
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4))
    assert torch.equal(media_features(model, decoder, [2, 3, 0], tmp_path)[[0, 2]], first[[2, 0]])  # type: ignore[list-item]
    assert len(runs) == 4
    torch.testing.assert_close(media_features(model, decoder, [0, 1, 2, 1]), first)  # type: ignore[list-item]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(media_features(model, decoder, [0, 1, 2, 1], tmp_path), first)  # type: ignore[list-item]
    with torch.no_grad():
        next(model.vision_encoder.parameters()).add_(0.1)
    assert not torch.equal(media_features(model, decoder, [0, 1, 2, 1], tmp_path), first)  # type: ignore[list-item]
    assert len(list(tmp_path.iterdir())) == 2
