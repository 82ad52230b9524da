"""Have a conversation on the page in a real headless browser, on the quickstart's model.

``DEMO_SCREENSHOTS=docs/images pytest --long tests/demo_page/test_browser.py`` writes the pictures of docs/demo.md.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.demo_page.conftest import FLAGS
from tests.demo_page.test_server import free_port
from tests.project.commands import ROOT
from trainer.demo_page.limits import Limits
from trainer.prompting.exported_model import load_exported_model, load_layout

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

EXPORT = ROOT / "runs/quickstart/flamingo/export"
SHARD = ROOT / "data/quickstart/test/held_out_pairs/00000.tar"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMITS = Limits(upload_mib=2)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
    pytest.mark.skipif(not EXPORT.is_dir() or not SHARD.is_file(), reason="run launch_scripts/quickstart.sh first"),
]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Images of two handwritten digits that the model has not seen: 80, 44 and 25; and a file that is none."""
    with tarfile.open(SHARD) as shard:
        for number in range(3):
            member = shard.extractfile(f"{number:06}.png")
            assert member is not None
            (tmp_path / f"digits-{number}.png").write_bytes(member.read())
    (tmp_path / "damaged.png").write_bytes(b"no image")
    (tmp_path / "large.png").write_bytes(bytes(3_000_000))
    return sorted(tmp_path.glob("digits-*.png"))


@pytest.fixture
def address() -> Iterator[str]:
    """Address of a page with the quickstart's model."""
    from trainer.demo_page.page import build_page
    from trainer.demo_page.server import start

    exported = load_exported_model(EXPORT, load_layout(EXPORT), FLAGS, with_videos=True)
    page = build_page(exported, LIMITS, "runs/quickstart/flamingo/export")
    yield start(page, "127.0.0.1", free_port(), LIMITS)
    page.close(verbose=False)


class Visitor:
    """Does with the page what a person does."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def count(self, selector: str, number: int) -> None:
        """Wait until the page has a number of elements."""
        sync_api.expect(self.page.locator(selector)).to_have_count(number)

    def add_text(self, text: str) -> None:
        number = self.page.locator("#pieces .piece").count()
        self.page.locator("#text textarea, #text input").first.fill(text)
        self.page.click("#add_text")
        self.count("#pieces .piece", number + 1)

    def upload(self, *files: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.click("#upload")
        chooser.value.set_files(files)

    def add_files(self, *files: Path) -> None:
        number = self.page.locator("#pieces .piece").count()
        self.upload(*files)
        self.count("#pieces .piece", number + len(files))

    def kinds(self) -> list[str]:
        return [piece.get_attribute("data-kind") for piece in self.page.locator("#pieces .piece").all()]

    def sees(self, text: str) -> None:
        """Wait for a message, and close it."""
        toast = self.page.locator(".toast-body").filter(has_text=text)
        sync_api.expect(toast).to_be_visible()
        toast.get_by_test_id("toast-close").click()
        sync_api.expect(toast).to_be_hidden()

    def generate(self) -> str:
        self.page.click("#generate")
        self.page.wait_for_selector("#words .word")
        return str(self.page.locator("#answer textarea").input_value())

    def photograph(self, path: Path) -> None:
        """Save the whole page in few colors, which keeps the file small."""
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(500)  # animations
        self.page.screenshot(path=path, full_page=True)


@pytest.fixture
def visitor(address: str) -> Iterator[Visitor]:
    """A browser on the page; requests to other hosts and errors in its console fail the test."""
    hosts, errors = set(), []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        sync_api.expect.set_options(timeout=60_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#generate")
        yield Visitor(page)
        browser.close()
    assert hosts - {None} == {"127.0.0.1"}
    assert [error for error in errors if "413" not in error] == []  # the upload that is too large


def test_a_real_conversation(visitor: Visitor, files: list[Path], tmp_path: Path) -> None:
    pictures = Path(os.environ.get("DEMO_SCREENSHOTS", tmp_path))
    visitor.add_files(files[0])
    visitor.add_text("a handwritten eight and a zero")
    visitor.page.click("#keep")
    visitor.count("#examples .example", 1)
    visitor.add_files(files[1])
    visitor.page.locator("#answer textarea").fill("a handwritten four and a four")
    visitor.page.click("#keep")
    visitor.count("#examples .example", 2)
    visitor.add_files(files[2])
    text = visitor.generate()
    assert text.startswith("a handwritten ") and text.endswith(" and a five")
    words = visitor.page.locator("#words .word")
    assert [word.locator("b").inner_text() for word in words.all()] == text.split()
    assert words.last.locator("small").inner_text() == "image 3, 100 %"
    assert visitor.page.locator("#gates .layer").count() == 4
    visitor.photograph(pictures / "demo.png")
    picture = words.last.locator("img")
    small = picture.bounding_box()
    words.last.click()
    visitor.page.wait_for_function("document.querySelector('#words .word:last-child img').clientHeight > 200")
    assert small is not None and small["height"] < 120
    words.last.scroll_into_view_if_needed()
    visitor.page.locator("#words").screenshot(path=pictures / "demo_attention.png")


def test_pieces_and_examples_can_be_moved_and_deleted(visitor: Visitor, files: list[Path]) -> None:
    visitor.add_text("first")
    visitor.add_files(*files[:2])
    assert visitor.kinds() == ["text", "image", "image"]
    visitor.page.locator("#pieces .piece").first.get_by_title("move later").click()
    sync_api.expect(visitor.page.locator("#pieces .piece").nth(1)).to_have_attribute("data-kind", "text")
    visitor.page.locator("#pieces .piece").first.get_by_title("delete").click()
    visitor.count("#pieces .piece", 2)
    assert visitor.kinds() == ["text", "image"]
    visitor.page.click("#keep")
    visitor.count("#examples .example", 1)
    visitor.page.locator("#examples").get_by_title("delete").click()
    visitor.count("#examples .example", 0)
    visitor.add_text("again")
    visitor.page.click("#clear")
    visitor.count("#pieces .piece", 0)


def test_mistakes_are_messages(visitor: Visitor, files: list[Path]) -> None:
    visitor.page.click("#generate")
    visitor.sees("The prompt is empty: add an image, a video or a text first.")
    visitor.upload(files[0].with_name("damaged.png"))
    visitor.sees("damaged.png cannot be used: it is not an image that can be read, or it is damaged.")
    visitor.upload(files[0].with_name("large.png"))
    visitor.sees("large.png")
    visitor.upload(files[0], files[0].with_name("damaged.png"))
    visitor.sees("damaged.png cannot be used")
    visitor.count("#pieces .piece", 1)
