"""Check the page of ``trainer.inspect --html``."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from model.image_geometry import PatchBudget
from tests.data.helpers import (
    DECODER,
    IMAGE,
    PAD,
    SAMPLE,
    document_builder,
    image_bytes,
    mmc4,
    noise,
    pair_builder,
    saved,
    text_of,
)
from tests.distributed.small_run import make_assets, run_settings
from trainer import inspect
from trainer.data.batch import BatchFormat, collate
from trainer.data.samples.rows import pack, sample_rng
from trainer.data.stream.contact_sheet import contact_sheet


class Page(HTMLParser):
    """Parse a page: its tags, title, class and color of each token, color and pixels of each image."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, bool, str]] = []
        self.images: list[tuple[str, np.ndarray]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        color = re.search(r"hsl\((\d+)", values.get("style", ""))
        if tag == "span" and values.get("title", "").startswith("token"):
            self.tokens.append((values["title"], values.get("class") == "trained", color[1] if color else ""))
        if tag == "img":
            data = base64.b64decode(values["src"].removeprefix("data:image/png;base64,"))
            self.images.append((color[1] if color else "", np.array(Image.open(io.BytesIO(data)))))


def test_images_are_shown_in_their_own_aspect() -> None:
    pairs = pair_builder(replace(DECODER, budget=PatchBudget(6, 4)))
    pictures = [noise(20, 30), noise(30, 20, seed=1)]
    rows = [pairs({"png": saved(one, "PNG"), "txt": b"a"}, SAMPLE, sample_rng(0, SAMPLE)) for one in pictures]
    batch = collate(rows, BatchFormat(PAD, 4, patch_size=4), source="a", keeps_aspect=True)
    assert (batch.media.shape, batch.media_grids) == ((12, 3, 4, 4), ((1, 2, 3), (1, 3, 2)))
    page = Page(contact_sheet([batch], lambda token: text_of([token]), IMAGE, title="t", rows=9))
    for row, (_, shown) in zip(rows, page.images, strict=True):
        np.testing.assert_array_equal(shown, row.media[0][0].permute(1, 2, 0).numpy())
    assert [shown.shape for _, shown in page.images] == [(8, 12, 3), (12, 8, 3)]


def test_a_packed_row() -> None:
    rng = sample_rng(0, SAMPLE)
    pairs = pair_builder()
    texts = (b"<script>alert(1)</script>", b"cat\x1b[31m")
    rows = [pairs({"png": image_bytes((9 * n + 9,) * 3), "txt": text}, SAMPLE, rng) for n, text in enumerate(texts)]
    document = document_builder()(mmc4(["one", "two"], [0, 1]), SAMPLE, rng)
    batch = collate([pack(rows), pack([document])], BatchFormat(PAD, 8), source="a<b")
    text = contact_sheet([batch], lambda token: text_of([token]), IMAGE, title="<t>", rows=9)
    page = Page(text)
    assert "script" not in page.tags and "\x1b" not in text
    assert page.tags.count("section") == 2 and text.count('class="document"') == 3
    assert [int(pixels[0, 0, 0]) for _, pixels in page.images] == [9, 18, 10, 20]
    colors = [color for color, _ in page.images]
    assert len(set(colors)) == 4
    assert len(page.tokens) == int(batch.attention_mask.sum())
    flat = [
        (int(m), int(y))
        for m, y in zip(
            batch.media_index[batch.attention_mask == 1], batch.labels[batch.attention_mask == 1], strict=True
        )
    ]
    for (title, trained, color), (medium, label) in zip(page.tokens, flat, strict=True):
        assert f"medium {medium}" in title and trained == (label >= 0)
        assert color == ("" if medium < 0 else colors[medium])
    assert "1 of 2 rows are shown" in contact_sheet([batch], lambda token: "x", IMAGE, title="t", rows=1)


@pytest.mark.parametrize("packed", [False, True])
def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool) -> None:
    make_assets(tmp_path)
    settings = run_settings(tmp_path, tmp_path / "run")
    for source in settings["data"]["sources"]:
        source["packing"] = packed
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert inspect.main([str(config), "--step", "2", "--html", str(tmp_path / "sheet.html")]) == 0
    out = capsys.readouterr().out
    assert ("packed rows" in out) == packed
    page = Page((tmp_path / "sheet.html").read_text())
    assert page.tags.count("section") == 16 and page.tags.count("h2") == 3
    assert all(pixels.shape == (16, 16, 3) for _, pixels in page.images) and len(page.images) >= 12


def test_runs_of_other_trainers_have_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_assets(tmp_path)
    settings = run_settings(tmp_path, tmp_path / "run")
    del settings["model"]
    settings |= {"architecture": {"model_type": "llama"}, "task": "language_model"}
    settings["data"]["sources"] = settings["data"]["sources"][2:]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert inspect.main([str(config), "--html", str(tmp_path / "sheet.html")]) == 1
    assert "trainer.train" in capsys.readouterr().err
