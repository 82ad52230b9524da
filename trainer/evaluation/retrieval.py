"""Find the images that are most similar to a query's (RICES; paper, section 4; Yang et al. 2022).

Features are those of the frozen tower, averaged over frames and patches and normalized. They are cached in a folder by
the content of tower and image. Each image is encoded alone, so that its features, and with them the order of
similarity, do not depend on the images that were cached before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from model.flamingo import Flamingo
from model.media_cache import media_key, most_of_all_ranks
from trainer.data.samples.prompt_media import Media
from trainer.evaluation.query import Medium
from trainer.runtime.files import write_atomically

_log = logging.getLogger(__name__)


class StackingDecoder(Protocol):
    """Decode media; ``trainer.evaluation.media.MediaDecoder`` does."""

    def stack(self, media: Sequence[Medium]) -> Media:
        """Return ``media`` and ``media_grids`` of the model."""


@torch.no_grad()
def media_features(
    model: Flamingo,
    decoder: StackingDecoder,
    media: Sequence[Medium],
    cache: Path | None = None,
    *,
    synced_ranks: bool = False,
) -> Tensor:
    """Return the normalized features of media, float32 [M, V] on the CPU.

    Args:
        model: Model with the tower.
        decoder: Decodes the media as for the prompts.
        media: Media, in the order of the result.
        cache: Folder of the features; None computes them anew. A partitioned tower has no content to name them by, and
            is not cached.
        synced_ranks: Whether the tower is partitioned over ranks, which then encode equally many media.

    Raises:
        ValueError: A medium cannot be decoded.
    """
    encoder = model.vision_encoder
    whole = all(parameter.numel() for parameter in encoder.parameters())
    file = None if cache is None or not whole else cache / f"features-{_tower_key(model)}.safetensors"
    known = {} if file is None else _read(file)
    found: list[bytes] = []
    new = 0
    for medium in media:
        pixels, grids = decoder.stack([medium])
        assert pixels is not None
        key = media_key(pixels, None if grids is None else grids[0])
        found.append(key)
        if key not in known:
            new += 1
            features = encoder(pixels.to(model.device), grids).float()
            known[key] = F.normalize(features.flatten(0, -2).mean(0), dim=0).cpu()
    if synced_ranks:
        for _ in range(most_of_all_ranks(new, model.device) - new):
            size = encoder.image_size
            encoder(torch.zeros(1, 1, 3, size, size, dtype=torch.uint8, device=model.device), None)
    if file is not None and new:
        _write(file, known)
    return torch.stack([known[key] for key in found])


def most_similar(query_features: Tensor, support_features: Tensor, count: int) -> Tensor:
    """Return the most similar supports of each query, most similar last, int64 [M, count].

    Args:
        query_features: Normalized features of the queries, [M, V].
        support_features: Normalized features of the supports.
        count: Number of supports to find.

    Raises:
        ValueError: There are fewer supports, or features are not numbers.
        ModuleNotFoundError: faiss is not installed.
    """
    if count > len(support_features):
        raise ValueError(
            f"demonstrations: rices needs {count} images, but the training set has {len(support_features)}: "
            "take fewer shots"
        )
    if not (query_features.isfinite().all() and support_features.isfinite().all()):
        raise ValueError("features of the tower are no numbers (nan or inf): set dtype float32")
    if count == 0 or not len(query_features):
        return torch.zeros(len(query_features), count, dtype=torch.int64)
    index = _faiss().IndexFlatIP(support_features.shape[1])
    index.add(support_features.float().contiguous().numpy())
    _, places = index.search(query_features.float().contiguous().numpy(), count)
    return torch.from_numpy(places).flip(1)


def _faiss() -> ModuleType:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'demonstrations: rices needs faiss, which is not installed: pip install "flamingo-trainer[evaluation]", or '
            "set demonstrations: random"
        ) from error
    return faiss


def _tower_key(model: Flamingo) -> str:
    """Return a hash of the tower's weights, their type and the settings that choose its features."""
    encoder = model.vision_encoder
    digest = hashlib.blake2b(repr((encoder.config, encoder.mean, encoder.std)).encode(), digest_size=16)
    for name, tensor in encoder.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        digest.update(repr((name, plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path) -> dict[bytes, Tensor]:
    """Return the cached features; a damaged file counts as absent."""
    try:
        tensors = load(file.read_bytes())
        keys, features = tensors["keys"], tensors["features"]
    except FileNotFoundError:
        return {}
    except (SafetensorError, KeyError, OSError) as error:
        _log.warning("%s cannot be used (%s): its features are computed again", file, error)
        return {}
    return {bytes(key.tolist()): row for key, row in zip(keys, features, strict=True)}


def _write(file: Path, known: dict[bytes, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    keys = torch.tensor([list(key) for key in known], dtype=torch.uint8)
    write_atomically(file, save({"keys": keys, "features": torch.stack(list(known.values()))}))
