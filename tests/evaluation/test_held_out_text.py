"""Test how held-out documents are cut into pieces."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.data.helpers import build_manifest, write_shard
from trainer.data.samples.text_encoding import TextEncoding
from trainer.evaluation.held_out_text import read_held_out_text

BYTES = TextEncoding(lambda text: [byte + 3 for byte in text.encode()], bos_id=0, eos_id=1, pad_id=2)


def texts(folder: Path, *shards: list[bytes]) -> Path:
    for number, shard in enumerate(shards):
        samples = [(f"t{index}", {"txt": text}) for index, text in enumerate(shard)]
        write_shard(folder / f"{number}.tar", samples)
    build_manifest(folder)
    return folder / "manifest.npz"


@pytest.mark.parametrize("max_tokens", [2, 3, 4, 9])
def test_each_token_is_predicted_once_from_the_one_before(tmp_path: Path, max_tokens: int) -> None:
    manifest = texts(tmp_path, ["äbc".encode(), b"hello"])
    found = read_held_out_text(manifest, BYTES, 10, max_tokens)
    assert found.num_bytes == 4 + 5
    predicted = [token for piece in found.pieces for token in piece[1:]]
    assert predicted == [byte + 3 for byte in "äbchello".encode()]
    assert max(map(len, found.pieces)) <= max_tokens
    previous = None
    for piece in found.pieces:
        assert piece[0] in (0, previous)
        previous = piece[-1]


def test_documents_are_spread_evenly_and_always_the_same(tmp_path: Path) -> None:
    manifest = texts(tmp_path, [b"a", b"b", b"c"], [b"d"], [b"e", b"f"])
    found = read_held_out_text(manifest, BYTES, 3, 8)
    assert [bytes(token - 3 for token in piece[1:]) for piece in found.pieces] == [b"a", b"c", b"e"]
    assert read_held_out_text(manifest, BYTES, 3, 8) == found
    assert read_held_out_text(manifest, BYTES, 99, 8).num_bytes == 6


def test_documents_that_cannot_be_used_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = texts(tmp_path / "some", [b"good", b"\xff\xfe", b"  "])
    with caplog.at_level(logging.WARNING):
        found = read_held_out_text(manifest, BYTES, 9, 8)
    assert found.num_bytes == 4
    assert "invalid_utf8" in caplog.text and "empty_text" in caplog.text and "t2" in caplog.text
    with pytest.raises(ValueError, match="has no text that can be measured"):
        read_held_out_text(texts(tmp_path / "none", [b" "]), BYTES, 9, 8)
