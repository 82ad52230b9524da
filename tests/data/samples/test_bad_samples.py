"""Read every kind of bad sample from real shards: nothing crashes, and the stream counts each reason."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from model.processor import PlainTextEncoder
from tests.data.helpers import DECODER, build_manifest, image_bytes, mmc4, noise, saved, step_loader, write_shard
from tests.data.shards.test_reader import Bomb
from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource
from trainer.data.batch import SampleId
from trainer.data.errors import SampleError
from trainer.data.samples.interleaved_rows import InterleavedBuilder
from trainer.data.samples.pair_rows import PairBuilder
from trainer.data.samples.rows import RowBuilder, sample_rng
from trainer.data.samples.text_encoding import TextEncoding
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader

GOOD = image_bytes((9, 8, 7))
JPEG, PNG = saved(noise(90, 90), "JPEG"), saved(noise(50, 50), "PNG")


def _giant() -> bytes:
    """Return a PNG of 30,000 x 30,000 pixels in less than a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _document(**changes: Any) -> dict[str, bytes]:
    members = mmc4(["ab", "cd"], [0, 1])
    return {**members, "json": json.dumps({**json.loads(members["json"]), **changes}).encode()}


def _matched(index: object, **more: object) -> dict[str, bytes]:
    return _document(image_info=[{"image_name": "0.png", "matched_text_index": index, "matched_sim": 0.5, **more}])


# Key -> members, and the reason for rejection; None for a usable sample.
PAIRS: dict[str, tuple[dict[str, bytes], str | None]] = {
    "empty": ({"jpg": b"", "txt": b"a"}, "empty_image"),
    "corrupt": ({"jpg": b"\xff\xd8\xff rubbish", "txt": b"a"}, "corrupt_image"),
    "truncated_jpeg": ({"jpg": JPEG[: len(JPEG) // 2], "txt": b"a"}, "truncated_image"),
    "truncated_png": ({"png": PNG[: len(PNG) // 2], "txt": b"a"}, "truncated_image"),
    "giant": ({"png": _giant(), "txt": b"a"}, "too_many_pixels"),
    "no_image": ({"txt": b"a"}, "missing_image"),
    "two_images": ({"jpg": JPEG, "png": PNG, "txt": b"a"}, "several_images"),
    "only_pickles": ({"pkl": pickle.dumps(Bomb()), "txt": b"a"}, "missing_image"),
    "no_text": ({"png": GOOD}, "missing_text"),
    "empty_text": ({"png": GOOD, "txt": b" \n"}, "empty_text"),
    "latin_1": ({"png": GOOD, "txt": b"caf\xe9"}, "invalid_utf8"),
    "half_a_surrogate_pair": ({"png": GOOD, "txt": b"\xed\xa0\x80"}, "invalid_utf8"),
    "cmyk": ({"jpg": saved(noise(20, 20).convert("CMYK"), "JPEG"), "txt": b"a"}, None),
    "gray": ({"jpg": saved(noise(20, 20).convert("L"), "JPEG"), "txt": b"a"}, None),
    "nul_and_controls": ({"png": GOOD, "txt": b"a\0b\x1b[2J"}, None),
    "../../up": ({"png": GOOD, "txt": b"a", "pth": pickle.dumps(Bomb())}, None),
    "/absolute": ({"png": GOOD, "txt": b"a"}, None),
}
DOCUMENTS: dict[str, tuple[dict[str, bytes], str | None]] = {
    "broken": ({"json": b'{"text_list": ["a"'}, "invalid_json"),
    "nan": ({"json": b'{"text_list": ["a"], "image_info": NaN}'}, "invalid_json"),
    "huge_float": ({"json": b'{"text_list": ["a"], "image_info": [1e999]}'}, "invalid_json"),
    "huge_similarity": (_matched(0, matched_sim=10**400), "missing_similarity"),
    "half_a_surrogate_pair": (_document(text_list=["ab \ud800", "cd"]), "invalid_json"),
    "latin_1": ({"json": b'{"text_list": ["caf\xe9"]}'}, "invalid_utf8"),
    "no_json": ({"png": GOOD}, "missing_json"),
    "no_images": (_document(image_info=[]), "no_images"),
    "no_texts": (_document(text_list=[]), "empty_text"),
    "index_too_large": (_matched(2), "match_out_of_range"),
    "index_negative": (_matched(-1), "match_out_of_range"),
    "index_huge": (_matched(10**30), "match_out_of_range"),
    "index_float": (_matched(0.0), "invalid_document"),
    "image_is_a_path": (_matched(0, image_name="../0.png"), "missing_image"),
    "similarity_is_text": (_matched(0, matched_sim="NaN"), "missing_similarity"),
    "emoji": (_matched(0, url="https://host/\U0001f600"), None),
}


def _builder(source: ImageTextSource | InterleavedSource) -> RowBuilder:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["<s>", "</s>", "<pad>", "<image>", "<|endofchunk|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet))
    encoding = TextEncoding(PlainTextEncoder(tokenizer), *range(5))
    if isinstance(source, ImageTextSource):
        return PairBuilder(source, encoding, DECODER)
    return InterleavedBuilder(source, encoding, DECODER)


@pytest.mark.parametrize(("name", "samples"), [("pairs", PAIRS), ("documents", DOCUMENTS)])
def test_each_sample_has_its_reason_and_the_stream_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    samples: dict[str, tuple[dict[str, bytes], str | None]],
) -> None:
    monkeypatch.chdir(tmp_path)  # a pickle that ran would leave a file here
    good = {"png": GOOD, "txt": b"good"} if name == "pairs" else _matched(0)
    whole = [(f"good{number}", good) for number in range(60)]
    write_shard(tmp_path / "data/0.tar", [*((key, members) for key, (members, _) in samples.items()), *whole])
    path = build_manifest(tmp_path / "data")
    source: ImageTextSource | InterleavedSource
    if name == "pairs":
        source = ImageTextSource(name, path, 1)
    else:
        source = InterleavedSource(name, path, 1, min_similarity=0.1)
    reader, build = ShardReader(load_manifest(path)), _builder(source)
    found: dict[str, str | None] = {}
    for index in range(len(samples)):
        key, members = reader.read(0, index)
        sample = SampleId(name, 0, "0.tar", index, key)
        try:
            assert build(members, sample, sample_rng(0, sample)).media
            found[key] = None
        except SampleError as error:
            found[key] = error.reason
    assert found == {key: reason for key, (_, reason) in samples.items()}

    count = len(samples) + len(whole)
    loader = step_loader(DataConfig((source,), num_workers=0), {name: build}, stop=count)
    batches = [batch for step in loader for batch in step.micro_batches]
    counted = sum((batch.rejected for batch in batches), start=Counter[str]())
    expected = Counter(reason for _, reason in samples.values() if reason is not None)
    assert len(batches) == count
    # A substitute may be bad too, and is then counted as well.
    assert set(counted) == set(expected) and all(counted[reason] >= expected[reason] for reason in expected)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data"]
