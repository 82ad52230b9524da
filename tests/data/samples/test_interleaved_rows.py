"""Check rows of MMC4 documents: order of images, windows, labels, p_next, and bad documents."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tests.data.helpers import EOC, IMAGE, NO_MANIFEST, SAMPLE, document_builder, image_bytes, mmc4, text_of
from trainer.config.data_config import InterleavedSource
from trainer.data.batch import Row, SampleId
from trainer.data.errors import SampleError
from trainer.data.samples.mmc4_document import parse_document
from trainer.data.samples.rows import sample_rng

TEXTS = ["zero.", "one.", "two.", "three."]


def build(members: dict[str, bytes], index: int = 0, **options: Any) -> Row:
    sample = SampleId("source", 0, "a.tar", index, "doc")
    return document_builder(**options)(members, sample, sample_rng(0, sample))


def levels(row: Row) -> list[int]:
    """Return the numbers of the images; ``mmc4`` paints image i with level 10 * (i + 1)."""
    return [int(medium[0, 0, 0, 0]) // 10 - 1 for medium in row.media]


def trained(row: Row) -> str:
    return "".join("." if label < 0 else text_of([int(label)]) for label in row.labels)


def reason(members: dict[str, bytes], **options: Any) -> str:
    with pytest.raises(SampleError) as caught:
        build(members, **options)
    return caught.value.reason


def test_images_in_sentence_order() -> None:
    row = build(mmc4(TEXTS, [3, 0, 2]))
    assert text_of(row.input_ids) == "B#zero. one.|#two.|#three.|"
    assert levels(row) == [1, 2, 0]
    assert trained(row).replace(".", "") == "zero one|two|three|"
    assert row.media_index[:3].tolist() == [-1, 0, 0]
    assert row.media_index[-1] == 2


def test_labels_leave_out_bos_and_images_only() -> None:
    row = build(mmc4(["ab", "cd"], [1, 0]))
    assert text_of(row.input_ids) == "B#ab|#cd|"
    assert row.labels.tolist() == [-100, -100, *row.input_ids[2:5].tolist(), -100, *row.input_ids[6:].tolist()]


def test_text_before_the_first_image_sees_none() -> None:
    row = build(mmc4(["ab", "cd"], [1]))
    assert text_of(row.input_ids) == "Bab#cd|"
    assert row.media_index.tolist() == [-1, -1, -1, 0, 0, 0, 0]
    following = build(mmc4(["ab", "cd"], [1]), p_next=1.0)
    assert following.media_index.tolist() == [0, 0, 0, -1, -1, -1, -1]


def test_p_next_is_drawn_once_for_each_document() -> None:
    members = mmc4(["a", "b", "c"], [0, 1, 2])
    kinds = {False: [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2], True: [0, 1, 1, 1, 2, 2, 2, -1, -1, -1]}
    drawn = []
    for index in range(200):
        found = build(members, index, p_next=0.5).media_index.tolist()
        drawn.append(next(kind for kind, value in kinds.items() if value == found))
    assert 70 < sum(drawn) < 130


def test_two_images_of_one_sentence() -> None:
    row = build(mmc4(["ab", "cd"], [1, 1, 0]))
    assert text_of(row.input_ids) == "B#ab|#|#cd|"
    assert levels(row) == [2, 0, 1]
    assert trained(row) == "..ab|...cd|"  # the end-of-chunk after an image without text is not trained on
    assert row.media_index.tolist() == [-1, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_an_image_of_an_empty_sentence() -> None:
    row = build(mmc4(["ab", "  "], [1, 0]))
    assert text_of(row.input_ids) == "B#ab|#|"
    assert trained(row) == "..ab|.."


def test_more_images_than_the_maximum() -> None:
    row = build(mmc4(TEXTS, [0, 1, 2, 3]), max_images=2)
    assert text_of(row.input_ids) == "B#zero.|#one.|"
    assert len(row.media) == 2
    assert [image.reason for image in row.dropped_images] == ["filtered_max_images"] * 2
    assert "after the first 2 (max_images)" in row.dropped_images[0].detail
    assert not build(mmc4(TEXTS, [0, 1, 2, 3]), max_images=4).dropped_images


def test_random_windows_contain_images() -> None:
    members = mmc4(["x" * 30, "y" * 30, "z" * 30], [1])
    found = set()
    for index in range(200):
        row = build(members, index, max_tokens=20)
        text = text_of(row.input_ids)
        assert (len(text), text[0], text.count("#"), len(row.media)) == (20, "B", 1, 1)
        found.add(text)
    assert len(found) == 19  # one window for each place of the image


def test_window_from_the_start() -> None:
    members = mmc4(["abc", "def"], [0, 1])
    assert text_of(build(members, subsequence="start", max_tokens=4).input_ids) == "B#ab"
    assert reason(mmc4(["x" * 30, "y"], [1]), subsequence="start", max_tokens=10) == "filtered_subsequence"


def test_windows_do_not_begin_with_the_end_of_another_chunk() -> None:
    members = mmc4(["ab", "cd", "ef"], [0, 1, 2])
    texts = {text_of(build(members, index, max_tokens=6).input_ids) for index in range(100)}
    assert all(text[1] != "|" for text in texts)
    assert texts == {"B#ab|#", "Bab|#c", "Bb|#cd", "B#cd|#", "Bcd|#e", "Bd|#ef", "B#ef|"} - {"B#ef|"}


def test_windows_reach_both_ends_of_the_document() -> None:
    found = {text_of(build(mmc4(["abcdef", "gh"], [1]), index, max_tokens=5).input_ids) for index in range(60)}
    assert found == {"Bdef#", "Bef#g", "Bf#gh", "B#gh|"}
    found = {text_of(build(mmc4(["ab", "cdefgh"], [0]), index, max_tokens=5).input_ids) for index in range(60)}
    assert found == {"B#ab "}


def test_only_images_of_the_window_are_decoded() -> None:
    members = {**mmc4(["abc", "def"], [0, 1]), "1.png": b"broken"}
    assert len(build(members, subsequence="start", max_tokens=4).media) == 1
    assert text_of(build(members).input_ids) == "B#abc def|"


def test_images_in_base64_and_by_full_name() -> None:
    encoded = base64.b64encode(image_bytes((50, 50, 50))).decode()
    info = [
        {"image_base64": encoded, "matched_text_index": 1},
        {"image_name": "doc.Photo.PNG", "matched_text_index": 0},
    ]
    content = json.dumps({"text_list": ["a", "b"], "image_info": info}).encode()
    row = build({"json": content, "photo.png": image_bytes((70, 70, 70))})
    assert levels(row) == [6, 4]


def test_minimum_similarity() -> None:
    members = mmc4(["a", "b"], [0, 1])
    content = json.loads(members["json"])
    content["image_info"][0]["matched_sim"] = 0.3
    content["image_info"][1]["matched_sim"] = 0.2
    members["json"] = json.dumps(content).encode()
    assert text_of(build(members, min_similarity=0.25).input_ids) == "B#a b|"
    assert reason(members, min_similarity=0.5) == "filtered_similarity"
    assert reason(mmc4(["a"], [0]), min_similarity=0.1) == "missing_similarity"


def document(**changes: Any) -> dict[str, bytes]:
    members = mmc4(["ab", "cd"], [0, 1])
    content = {**json.loads(members["json"]), **changes}
    return {**members, "json": json.dumps({k: v for k, v in content.items() if v is not None}).encode()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text_list": None}, "invalid_document"),
        ({"text_list": ["a", 1]}, "invalid_document"),
        ({"text_list": ["", " "]}, "empty_text"),
        ({"text_list": []}, "empty_text"),
        ({"image_info": None}, "invalid_document"),
        ({"image_info": [3]}, "invalid_document"),
        ({"image_info": []}, "no_images"),
        ({"image_info": [{"image_name": "0.png", "matched_text_index": 2}]}, "match_out_of_range"),
        ({"image_info": [{"image_name": "0.png", "matched_text_index": -1}]}, "match_out_of_range"),
        ({"image_info": [{"image_name": "0.png", "matched_text_index": True}]}, "invalid_document"),
        ({"image_info": [{"image_name": "0.png", "matched_text_index": 1.0}]}, "invalid_document"),
        ({"image_info": [{"image_name": "0.png"}]}, "missing_match"),
        ({"image_info": [{"image_name": "9.png", "matched_text_index": 0}]}, "missing_image"),
        ({"image_info": [{"image_name": "../0.png", "matched_text_index": 0}]}, "missing_image"),
        ({"image_info": [{"matched_text_index": 0}]}, "missing_image"),
        ({"image_info": [{"image_base64": "@@", "matched_text_index": 0}]}, "invalid_base64"),
        ({"image_info": [{"image_base64": "", "matched_text_index": 0}]}, "empty_image"),
        ({"image_info": [{"image_name": "0.png"}], "similarity_matrix": [[1]]}, "invalid_document"),
        ({"image_info": [{"image_name": "0.png"}], "similarity_matrix": [["a", 2]]}, "invalid_document"),
        ({"image_info": [{"image_name": "0.png"}], "similarity_matrix": [[1], [1, 2]]}, "invalid_document"),
    ],
)
def test_bad_documents(changes: dict[str, Any], expected: str) -> None:
    assert reason(document(**changes)) == expected


def test_bad_json() -> None:
    assert reason({"txt": b"x"}) == "missing_json"
    assert reason({"json": b"[]"}) == "invalid_document"
    assert reason({"json": b'{"text_list": NaN}'}) == "invalid_json"
    assert reason({"json": b"\xff"}) == "invalid_utf8"
    half = mmc4(["ab \ud800", "cd"], [0, 1])
    assert b"\\ud800" in half["json"] and reason(half) == "invalid_json"
    huge = document(image_info=[{"image_name": "0.png", "matched_text_index": 0, "matched_sim": 10**400}])
    assert reason(huge, min_similarity=0.1) == "missing_similarity"
    assert reason(document(image_info=[{"image_name": "0.png", "matched_text_index": 10**30}])) == "match_out_of_range"


def test_assignment_from_the_similarity_matrix() -> None:
    """Maximize the sum; a greedy assignment would leave image 1 with 0.1."""
    matrix = [[0.9, 0.8], [0.85, 0.1]]
    members = document(image_info=[{"image_name": "0.png"}, {"image_name": "1.png"}], similarity_matrix=matrix)
    row = build(members)
    assert (text_of(row.input_ids), levels(row)) == ("B#ab|#cd|", [1, 0])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_assignment_is_optimal_and_in_order(data: st.DataObject, images: int, sentences: int) -> None:
    value = st.floats(-1, 1, width=16)
    matrix = data.draw(
        st.lists(st.lists(value, min_size=sentences, max_size=sentences), min_size=images, max_size=images)
    )
    infos = [{"number": i} for i in range(images)]
    content = {"text_list": ["x"] * sentences, "image_info": infos, "similarity_matrix": matrix}
    placed = parse_document(content).images
    assert [image.sentence for image in placed] == sorted({image.sentence for image in placed})
    assert len(placed) == min(images, sentences)
    rows, columns = linear_sum_assignment(np.array(matrix), maximize=True)
    total = sum(matrix[image.info["number"]][image.sentence] for image in placed)
    assert total == pytest.approx(np.array(matrix)[rows, columns].sum())


@settings(max_examples=100, deadline=None)
@given(
    st.data(),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(8, 60),
    st.integers(1, 4),
    st.sampled_from(["random", "start"]),
)
def test_every_row_keeps_images_text_and_index_together(
    data: st.DataObject, sentences: int, images: int, max_tokens: int, max_images: int, window: str
) -> None:
    """Write each sentence's number into it, so that a row shows which image stands before which text."""
    matches = data.draw(st.lists(st.integers(0, sentences - 1), min_size=images, max_size=images))
    texts = [str(i) * 3 for i in range(sentences)]
    row, failed = None, ""
    try:
        row = build(
            mmc4(texts, matches),
            data.draw(st.integers(0, 99)),
            max_tokens=max_tokens,
            max_images=max_images,
            subsequence=window,
        )
    except SampleError as error:
        failed = error.reason
    if row is None:
        assert (failed, window) == ("filtered_subsequence", "start")
        return
    ids = row.input_ids.tolist()
    text = text_of(ids)
    assert len(ids) <= max_tokens
    assert text.count("#") == len(row.media) <= max_images
    assert [matches[image] for image in levels(row)] == sorted(matches[image] for image in levels(row))
    assert row.labels[row.input_ids == IMAGE].eq(-100).all()
    assert row.media_index.tolist() == [text[: i + 1].count("#") - 1 for i in range(len(text))]
    for at, image in zip([i for i, token in enumerate(ids) if token == IMAGE], levels(row), strict=True):
        after = text[at + 1 :].lstrip("#|")[:1]
        nearest = text[at + 1 : at + 2]
        if nearest and nearest not in "|#":
            assert nearest == str(matches[image])
        elif after:
            assert int(after) >= matches[image]
        before = text[at - 1]
        assert before == "|" or text[:at].count("#") == 0


def test_defaults_are_the_papers() -> None:
    source = InterleavedSource("documents", NO_MANIFEST, 1)
    assert (source.max_tokens, source.max_images, source.subsequence) == (256, 5, "random")


def test_special_tokens_in_the_text_are_refused() -> None:
    builder = document_builder()
    forged = replace(builder, encoding=replace(builder.encoding, encode=lambda text: [EOC]))
    with pytest.raises(SampleError, match="special_token"):
        forged(mmc4(["a"], [0]), SAMPLE, np.random.default_rng(0))


def test_media_are_uint8_squares() -> None:
    (medium,) = build(mmc4(["a"], [0])).media
    assert medium.shape == (1, 3, 8, 8)
    assert medium.dtype == torch.uint8


def test_an_unusable_image_is_dropped_where_another_is_left() -> None:
    """The row is that of the document without the image, and it is no longer than packing has reserved."""
    for changed in ({"1.png": b"broken"}, {"1.png": b""}):
        members = {**mmc4(["ab", "cd", "ef"], [0, 1, 2]), **changed}
        row = build(members)
        assert (text_of(row.input_ids), levels(row)) == ("B#ab cd|#ef|", [0, 2])
        assert [image.reason for image in row.dropped_images] in (["corrupt_image"], ["empty_image"])
        assert torch.equal(row.media_index, build(mmc4(["ab", "cd", "ef"], [0, 2])).media_index)
    everything = {**members, "0.png": b"broken", "2.png": b"broken"}
    assert reason(everything) == "corrupt_image"
    for max_tokens in (5, 9, 13, 40):
        for index in range(20):
            builder, sample = document_builder(max_tokens=max_tokens, max_images=1), SampleId("s", 0, "a", index, "doc")
            reserved = builder.length(members, sample, sample_rng(0, sample))
            try:
                made = builder(members, sample, sample_rng(0, sample))
            except SampleError:
                continue
            assert len(made.input_ids) <= reserved
            assert text_of(made.input_ids).count("#") == len(made.media) == 1


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"image_name": "9.png", "matched_text_index": 1}, "missing_image"),
        ({"image_name": "1.png", "matched_text_index": 7}, "match_out_of_range"),
        ({"image_name": "1.png", "matched_text_index": None}, "missing_match"),
        ({"image_name": "1.png", "matched_text_index": float("nan")}, "invalid_document"),
        ({"image_base64": "@@", "matched_text_index": 1}, "invalid_base64"),
        ("1.png", "invalid_document"),
    ],
)
def test_an_unusable_entry_is_dropped_where_another_is_left(entry: object, expected: str) -> None:
    row = build(document(image_info=[{"image_name": "0.png", "matched_text_index": 0}, entry]))
    assert (text_of(row.input_ids), levels(row)) == ("B#ab cd|", [0])
    assert [image.reason for image in row.dropped_images] == [expected]


def test_base64_as_people_write_it() -> None:
    data = image_bytes((50, 50, 50), kind="JPEG", quality=97)
    plain = base64.b64encode(data).decode()
    assert "+" in plain or "/" in plain
    url_safe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    lines = "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76)) + "\n"
    uri = f"data:image/jpeg;base64,{plain}"
    for encoded in (plain, lines, url_safe, uri, uri.replace("+", "%2B").replace("=", "%3D")):
        row = build(document(image_info=[{"image_base64": encoded, "matched_text_index": 0}]))
        assert int(row.media[0][0, 0, 0, 0]) == 50
    assert reason(document(image_info=[{"image_base64": "data:,abc", "matched_text_index": 0}])) == "invalid_base64"


def test_fields_that_nobody_asked_for_may_hold_anything() -> None:
    odd = {"score": float("nan"), "huge": 10**400, "title": "half \ud83d", "inf": float("-inf")}
    info = [{"image_name": "0.png", "matched_text_index": 0, "matched_sim": float("nan"), **odd}]
    assert text_of(build(document(image_info=info, **odd)).input_ids) == "B#ab cd|"
    assert reason(document(image_info=info), min_similarity=0.1) == "missing_similarity"


def test_a_document_is_cut_to_its_most_characters() -> None:
    members = mmc4(["abc", "def", "ghi"], [0, 2])
    row = build(members, max_document_characters=5)
    assert (text_of(row.input_ids), levels(row)) == ("B#abc de|", [0])
    assert reason(mmc4(["abc", "def"], [1]), max_document_characters=3) == "filtered_max_document_characters"
    assert text_of(build(members, max_document_characters=9).input_ids) == "B#abc def|#ghi|"
