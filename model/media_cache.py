"""Keep the latents of media by their content, so that demonstrations which several prompts share are encoded once.

Each medium is encoded alone: its latents must not depend, not even in their last bits, on the media that happened to
be missing together with it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from model.flamingo import Flamingo
from model.tower_patches import Grid


class MediaCache:
    """Encode media of one model, each distinct one once; the model must not change meanwhile.

    Attributes:
        encoded: Media that were encoded so far.
        found: Media that were found in the cache so far.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        """Build an empty cache.

        Args:
            max_bytes: Most bytes of latents that are kept. Those that were not used for the longest time are dropped.
        """
        self.encoded = self.found = 0
        self._latents: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes, self._max_bytes = 0, max_bytes

    def encode(
        self, model: Flamingo, media: Tensor, media_grids: Sequence[Grid] | None = None, *, synced_ranks: bool = False
    ) -> Tensor:
        """Return ``model.encode_media`` of the media.

        Args:
            model: Model, the same in every call.
            media: As for ``Flamingo.encode_media``.
            media_grids: As for ``Flamingo.encode_media``.
            synced_ranks: Whether several ranks run under ZeRO-3, where every module is a collective. Ranks with fewer
                new media then encode a medium again, until all are done.
        """
        pieces, grids = _split(media, media_grids)
        keys = [media_key(piece, grid) for piece, grid in zip(pieces, grids, strict=True)]
        missing = {key: place for place, key in enumerate(keys) if key not in self._latents}
        # Agreed before the first medium: encoding is a collective too, and ranks must not mix the two.
        rounds = most_of_all_ranks(len(missing), model.device) if synced_ranks else len(missing)
        new: dict[bytes, Tensor] = {}
        for key, place in missing.items():
            new[key] = _encode_one(model, pieces[place], grids[place])
        for _ in range(rounds - len(missing)):
            _encode_one(model, pieces[0], grids[0])
        self.encoded += len(missing)
        self.found += len(keys) - len(missing)
        latents = torch.cat([new[key] if key in new else self._latents[key] for key in keys])
        for key in keys:
            self._keep(key, new.get(key))
        return latents

    def _keep(self, key: bytes, latents: Tensor | None) -> None:
        if key in self._latents:
            self._latents.move_to_end(key)
        elif latents is not None:
            self._latents[key] = latents
            self._bytes += latents.nbytes
        while self._bytes > self._max_bytes and self._latents:
            _, dropped = self._latents.popitem(last=False)
            self._bytes -= dropped.nbytes


def most_of_all_ranks(number: int, device: torch.device) -> int:
    """Return the largest number that a rank has, a collective."""
    most = torch.tensor(number, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _split(media: Tensor, media_grids: Sequence[Grid] | None) -> tuple[list[Tensor], list[Grid | None]]:
    """Return the pixels of each medium, and its grid."""
    if media_grids is None:
        return list(media.split(1)), [None] * len(media)
    sizes = [frames * rows * columns for frames, rows, columns in media_grids]
    return list(media.split(sizes)), list(media_grids)


def media_key(pixels: Tensor, grid: Grid | None) -> bytes:
    """Return a hash of the pixels of a medium, and of its grid where it has one."""
    plain = pixels.detach().cpu().contiguous()
    found = hashlib.blake2b(repr((plain.dtype, tuple(plain.shape), grid)).encode(), digest_size=32)
    found.update(plain.flatten().view(torch.uint8).numpy().data)
    return found.digest()


def _encode_one(model: Flamingo, pixels: Tensor, grid: Grid | None) -> Tensor:
    return model.encode_media(pixels.to(model.device), None if grid is None else [grid])
