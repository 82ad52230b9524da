"""Draw heat maps, and write the lists of the page."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.flamingo import Flamingo
from tests.model.builders import tiny_config, tiny_flamingo
from trainer.demo_page.answers import Word
from trainer.demo_page.conversation import Conversation, Piece
from trainer.demo_page.gates import LayerGates, gates_of
from trainer.demo_page.markup import examples_markup, gates_markup, pieces_markup, words_markup
from trainer.demo_page.pictures import heat_map, preview

GRAY = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)


def one_patch(row: int, column: int) -> Tensor:
    shares = torch.zeros(2, 2)
    shares[row, column] = 1.0
    return shares


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_heat_map_is_orange_where_the_model_looked(row: int, column: int) -> None:
    drawn = pixels(heat_map(GRAY, one_patch(row, column), 64))
    assert drawn.shape == (64, 64, 3)
    warmth = drawn[..., 0] - drawn[..., 2]  # red minus blue
    hottest = np.unravel_index(warmth.argmax(), warmth.shape)
    assert (hottest[0] // 32, hottest[1] // 32) == (row, column)
    assert warmth.max() > 60 and warmth.min() < -20


def test_an_empty_map_and_a_uniform_map_can_be_drawn() -> None:
    assert (pixels(heat_map(GRAY, torch.zeros(2, 2), 32)) == pixels(heat_map(GRAY, torch.zeros(2, 2), 32))[0, 0]).all()
    uniform = pixels(heat_map(GRAY, torch.full((2, 2), 0.25), 32))
    assert (uniform == uniform[0, 0]).all() and uniform[0, 0, 0] > uniform[0, 0, 2]


def test_a_video_shows_frames_side_by_side() -> None:
    video = torch.arange(0, 240, 30, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 16, 32)
    strip = preview(video, 16)
    assert strip.height == 16 and strip.width == 4 * 32 + 3
    assert [pixels(strip)[8, 33 * place + 16, 0] for place in range(4)] == [0, 60, 150, 210]
    assert heat_map(video, one_patch(0, 0), 16).size == (32, 16)


def test_texts_are_escaped() -> None:
    evil = '<img src=x onerror="alert(1)">'
    text, picture = Piece("text", evil), Piece("image", evil, GRAY)
    prompt = Conversation((text, picture), ((text, picture),))
    words = [Word(f" {evil}", 1, (one_patch(0, 0),))]
    for markup in (pieces_markup(prompt), examples_markup(prompt), words_markup(words, [picture])):
        assert "onerror=&quot;alert" in markup or "onerror" not in markup
        assert "<img src=x" not in markup


def test_images_are_numbered_over_examples_and_prompt() -> None:
    images = [Piece("image", f"{number}.png", GRAY) for number in range(3)]
    prompt = Conversation(tuple(images[2:]), ((images[0], Piece("text", "a")), (images[1], Piece("text", "b"))))
    assert re.findall(r"image \d(?=<)", examples_markup(prompt)) == ["image 1", "image 2"]
    assert "image 3: 2.png" in pieces_markup(prompt)
    words = [Word("a", 1, (0.3 * one_patch(0, 0), 0 * one_patch(0, 0), 0.7 * one_patch(1, 1)))]
    markup = words_markup(words, images)
    assert re.findall(r"<small>(.*?)</small>", markup) == ["image 1, 30 %", "image 3, 70 %"]
    assert "no image" in words_markup([Word("a", 1, (0 * one_patch(0, 0),))], images[:1])


def test_pictures_are_part_of_the_page() -> None:
    markup = pieces_markup(Conversation((Piece("image", "a.png", GRAY),)))
    (uri,) = re.findall(r'src="data:image/png;base64,([^"]+)"', markup)
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (96, 96)


def gates(model: Flamingo) -> list[tuple[int, float | None, float | None]]:
    return [(one.block, one.attention, one.feed_forward) for one in gates_of(model)]


def test_gates_of_every_kind_are_read() -> None:
    opened = gates(tiny_flamingo(gates=0.5))
    assert [block for block, _, _ in opened] == [0, 1, 2]
    expected = pytest.approx(float(torch.tensor(0.5).tanh()))
    assert opened == [(block, expected, expected) for block in range(3)]
    cross_attention = tiny_config().cross_attention
    vector = tiny_flamingo(gates=0.5, cross_attention=replace(cross_attention, gate="vector"))
    assert gates(vector) == opened
    none = tiny_flamingo(cross_attention=replace(cross_attention, gate="none"))
    assert gates(none) == [(block, None, None) for block in range(3)]
    assert gates_markup(gates_of(none)).count("no gates") == 3


def test_gates_are_bars() -> None:
    markup = gates_markup([LayerGates(4, 0.25, -0.5)])
    assert re.findall(r"width:([\d.]+)%", markup) == ["25.0", "50.0"]
    assert "block 4" in markup and "+0.25<br>-0.50" in markup
