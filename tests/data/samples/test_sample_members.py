"""Find members of samples, and decode text and JSON strictly."""

from __future__ import annotations

import pytest

from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import decode_json, decode_text, image_member, text_member


def test_image_and_text_members() -> None:
    assert image_member({"txt": b"", "jpeg": b"1", "seg.png": b"2"}) == b"1"
    assert text_member({"txt": "\ufeff  täxt\n".encode()}) == "täxt"
    for members, wanted in (({"txt": b""}, "missing_image"), ({"jpg": b"", "png": b""}, "several_images")):
        with pytest.raises(SampleError) as caught:
            image_member(members)
        assert caught.value.reason == wanted
    for members, wanted in (
        ({"jpg": b""}, "missing_text"),
        ({"txt": b" \n"}, "empty_text"),
        ({"txt": b"caf\xe9"}, "invalid_utf8"),
        ({"txt": b"\xed\xa0\x80"}, "invalid_utf8"),
    ):
        with pytest.raises(SampleError) as caught:
            text_member(members)
        assert caught.value.reason == wanted


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a": 1} x',
        b"1" * 10_000,
        b'{"a": -1' + b"0" * 400 + b"}",
        b'{"a": "half of a pair: \\ud83d"}',
        b'{"a": ["\\uDC00\\uD83D"]}',
        b'{"\\udfff": 1}',
    ],
)
def test_invalid_json(data: bytes) -> None:
    with pytest.raises(SampleError, match="invalid_json"):
        decode_json(data)


def test_valid_json_and_text() -> None:
    assert decode_json(b'{"a": [1, 2.5, "\\u00e9", null, true]}') == {"a": [1, 2.5, "é", None, True]}
    assert decode_json(b'["\\ud83d\\ude00", "\\\\ud83d"]') == ["\U0001f600", "\\ud83d"]
    assert decode_text("é".encode()) == "é"
