"""Find members of samples, and decode text and JSON strictly."""

from __future__ import annotations

import math

import pytest

from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import (
    check_field,
    decode_json,
    decode_text,
    image_member,
    text_member,
    video_member,
)


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


@pytest.mark.parametrize(
    "text", ["\u200b\u200d", "\ufeff", "\0\x01", "\u00a0\u3000", "\u3164", "\u2800", "\ufe0f", "\u2060 \n"]
)
def test_a_text_that_shows_nothing_is_empty(text: str) -> None:
    with pytest.raises(SampleError, match="empty_text"):
        text_member({"txt": text.encode()})
    assert text_member({"txt": f"{text}a".encode()}).endswith("a")


@pytest.mark.parametrize("text", ["1", ".", "\U0001f642", "\u0915\u093f", "\u200b\u4e2d"])
def test_a_text_of_one_visible_character(text: str) -> None:
    assert text_member({"txt": text.encode()}) == text


def test_json_that_is_not_decoded_strictly() -> None:
    value = decode_json(b'{"a": NaN, "b": 1e999, "c": -%s, "d": "\\ud83d", "e": 1}' % (b"9" * 5000), strict=False)
    assert math.isnan(value["a"]) and value["b"] == math.inf and value["c"] == -math.inf and value["e"] == 1
    for name in "abcd":
        with pytest.raises(SampleError, match=f"invalid_json: {name}"):
            check_field(name, value[name])
    check_field("e", value["e"])
    with pytest.raises(SampleError, match="invalid_json"):
        decode_json(b'{"a": 1, "a": 2}', strict=False)


def test_a_gif_is_a_video_only_beside_no_other() -> None:
    assert video_member({"gif": b"1", "txt": b""}) == b"1"
    assert video_member({"gif": b"1", "mp4": b"2"}) == b"2"
    for members, wanted in (({"txt": b""}, "missing_video"), ({"avi": b"1", "mp4": b"2"}, "several_videos")):
        with pytest.raises(SampleError, match=wanted):
            video_member(members)


def test_names_that_are_not_utf_8_can_be_printed() -> None:
    with pytest.raises(SampleError) as caught:
        text_member({"caf\udce9": b""})
    assert str(caught.value).encode() and caught.value.detail.endswith(r"caf\udce9")
