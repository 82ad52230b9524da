"""Test that the page of an evaluation shows everything, escapes everything and needs no network."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.evaluation.page import page, write_page

EVIL = "<script>alert('x')</script>\"&'"
VOID = {"meta", "br", "rect", "path", "circle"}


class Parsed(HTMLParser):
    """Collect elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def image(color: str, size: tuple[int, int] = (300, 200)) -> bytes:
    """Return an encoded image of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def cell(score: float | None, **changes: Any) -> dict[str, Any]:
    bounds = {"low": None, "high": None} if score is None else {"low": score - 0.1, "high": score + 0.1}
    return {"score": score, **bounds, "queries": 20, "controls": {}, **changes}


def report() -> dict[str, Any]:
    blank = {**cell(0.3), "difference": {"score": -0.2, "low": -0.3, "high": -0.1}}
    shots = {"0": cell(0.5), "4": cell(0.5, controls={"blank": blank}), "8": cell(0.75)}
    return {
        "tasks": {EVIL: {"type": "vqa", "metric": "vqa_accuracy", "shots": shots}},
        "bounds": [{"task": EVIL, "shots": 8, "control": "none", "value": 0.75, "minimum": 0.7, "met": True}],
        "settings": {"confidence": 0.95, "seed": 1, EVIL: EVIL},
        "model": {"folder": EVIL},
    }


def example(**changes: Any) -> dict[str, Any]:
    fixed = {
        "task": EVIL, "shots": 1, "control": "none", "id": EVIL, "cluster": "c", "answer": EVIL, "answers": [EVIL, "b"],
        "score": 1.0, "scores": {}, "demonstrations": ["d"], "candidates": {EVIL: -1.5, "other": -3.0},
        "images": [image("red"), image("blue")], "prompt": [{"image": 0}, f"Output: {EVIL}", {"image": 1}, "Output:"],
    }  # fmt: skip
    return {**fixed, **changes}


def test_the_page_shows_scores_intervals_controls_and_examples() -> None:
    found = Parsed(page(report(), [example(), example(score=0.0), example(score=None)]))
    texts = "".join(found.texts)
    for part in (
        "75.0",
        "65.0 to 85.0",
        "95 % interval",
        "blank",
        "-20.0 (-30.0 to -10.0)",
        "-1.500",
        "truth:",
        "seed",
    ):
        assert part in texts
    classes = [attributes.get("class") for _, attributes in found.elements]
    assert [classes.count(name) for name in ("example right", "example wrong", "example")] == [1, 1, 1]
    tags = [tag for tag, _ in found.elements]
    assert (tags.count("circle"), tags.count("figure")) == (4, 1)


def test_everything_is_escaped_and_nothing_is_fetched() -> None:
    text = page(report(), [example()])
    found = Parsed(text)
    assert "script" not in {tag for tag, _ in found.elements}
    assert "".join(found.texts).count(EVIL) >= 9
    assert "alert('x')" not in text
    for _, attributes in found.elements:
        assert not {"src", "href", "onload", "onerror"} & attributes.keys()
    assert not re.findall(r"https?://", text.replace("http://www.w3.org", ""))
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in re.findall(r"url\((.*?)\)", text))
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text


def test_images_are_small_and_shown_once_each() -> None:
    uris = re.findall(r"url\(data:image/jpeg;base64,(.*?)\)", page(report(), [example()]))
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in uris]
    assert sizes == [(128, 85), (128, 85)]


@pytest.mark.parametrize("data", [b"", b"no image", image("red")[:60]])
def test_what_is_no_image_has_no_preview(data: bytes) -> None:
    text = page(report(), [example(images=[data, image("blue")])])
    assert text.count("no preview") == 1


def test_attention_is_drawn_over_the_images() -> None:
    maps = [[[[0.0, 0.2], [0.1, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], [[[0.7]], [[0.0]]]]
    text = page(report(), [example(attention={"tokens": [EVIL, "cat"], "patches": maps})])
    found = Parsed(text)
    assert [tag for tag, _ in found.elements].count("rect") == 5
    assert "30 %" in text and "70 %" in text and "no image" in text


def test_at_most_fifty_examples() -> None:
    text = page(report(), [example(images=[b"", b""])] * 60)
    assert text.count("class=prompt") == 50
    assert "50 of 60 prompts" in text


def test_unknown_answers_and_no_examples(tmp_path: Path) -> None:
    empty = report() | {"tasks": {"test": {"type": "vqa", "metric": "cider", "shots": {"0": cell(None)}}}, "bounds": []}
    write_page(tmp_path / "report.html", empty, [])
    found = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "test" in found.texts
    assert "svg" not in {tag for tag, _ in found.elements}
    one = Parsed(page(report(), [example(answers=[], score=None, answer="")]))
    assert "not known" in "".join(one.texts)
