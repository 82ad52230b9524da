"""Cut held-out documents into pieces that a language model predicts, so that each byte counts once."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import text_member
from trainer.data.samples.text_encoding import TextEncoding
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutText:
    """Hold the pieces of some documents.

    Attributes:
        pieces: Token ids of each piece. The first one is only seen: it is ``<BOS>``, or the last token of the piece
            before. All others are predicted.
        num_bytes: Bytes of all documents in UTF-8.
        digest: Digest of the pieces.
    """

    pieces: tuple[tuple[int, ...], ...]
    num_bytes: int
    digest: str


def read_held_out_text(manifest: Path, encoding: TextEncoding, num_documents: int, max_tokens: int) -> HeldOutText:
    """Read documents that are spread evenly over a manifest. Those that cannot be used are left out with a warning.

    Args:
        manifest: Manifest of texts.
        encoding: Encodes them.
        num_documents: Most documents.
        max_tokens: Most tokens of a piece.

    Raises:
        ShardError: A shard cannot be read.
        ValueError: No document can be used.
    """
    pieces: list[tuple[int, ...]] = []
    num_bytes = 0
    for name, text in _documents(manifest, num_documents):
        try:
            ids = [encoding.bos_id, *encoding.plain_ids(text_member(text))]
        except SampleError as error:
            _log.warning("forgetting.manifest: %s of %s is left out: %s", name, manifest, error)
            continue
        num_bytes += len(text_member(text).encode())
        starts = range(0, len(ids) - 1, max_tokens - 1)
        pieces += [tuple(ids[start : start + max_tokens]) for start in starts]
    if not pieces:
        raise ValueError(f"forgetting.manifest: {manifest} has no text that can be measured; name another one")
    digest = hashlib.sha256(repr(pieces).encode()).hexdigest()
    return HeldOutText(tuple(pieces), num_bytes, digest)


def _documents(manifest: Path, number: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    reader = ShardReader(load_manifest(manifest))
    try:
        ends = list(accumulate(int(count) for count in reader.manifest.samples))
        number = min(number, ends[-1])
        for chosen in (index * ends[-1] // number for index in range(number)):
            shard = bisect_right(ends, chosen)
            index = chosen - (ends[shard - 1] if shard else 0)
            key, members = reader.read(shard, index)
            yield f"sample {key}", dict(members)
    finally:
        reader.close()
