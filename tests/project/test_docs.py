"""docs/: the code of the concept pages runs, the pictures are what draw.py draws, and the site builds strictly."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.project.commands import ROOT

DOCS = ROOT / "docs"
PAGES = "checkpoints cluster data_layouts data_order first_cluster_run kernels large_models packing zero".split()
SPHINX = ("furo", "myst_nb", "sphinx")


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))  # an error then names the line of the page
        exec(compile("\n" * line + block[1], f"docs/{page}.md", "exec"), namespace)


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w/]+\.(?:md|ipynb))", (DOCS / "index.md").read_text(encoding="utf-8")))
    pages = {path.relative_to(DOCS).as_posix() for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)}
    assert pages - linked == {"index.md"}


def test_the_pictures_are_those_that_the_script_draws() -> None:
    script = runpy.run_path(str(DOCS / "draw.py"))
    for name, draw in script["PICTURES"].items():
        committed = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert committed == draw().svg(), f"docs/images/{name}.svg: run python docs/draw.py"


def test_every_picture_is_described_and_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in [*DOCS.rglob("*.md"), ROOT / "README.md"])
    described = {Path(target).name for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text) if words.strip()}
    drawn = {f"{name}.svg" for name in runpy.run_path(str(DOCS / "draw.py"))["PICTURES"]}
    assert drawn <= described


def test_the_reference_has_every_command() -> None:
    commands = runpy.run_path(str(DOCS / "generate.py"))["COMMANDS"]
    files = [*(ROOT / "trainer").glob("*.py"), *(ROOT / "trainer").glob("*/__main__.py")]
    started = [path for path in files if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]
    names = {f"trainer.{path.parent.name if path.stem == '__main__' else path.stem}" for path in started}
    assert set(commands) == names


def test_missing_packages_are_named(tmp_path: Path) -> None:
    environment = {**os.environ, "VENV": str(tmp_path)}
    done = subprocess.run(
        [ROOT / "launch_scripts/docs.sh"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert "Sphinx is missing; run launch_scripts/setup.sh --dev" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(any(find_spec(name) is None for name in SPHINX), reason="Sphinx is missing: setup.sh --dev")
def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "launch_scripts/docs.sh", tmp_path / "site"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VENV": sys.prefix},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path: Links(path) for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > 20
    assert [f"{page.name}: {link}" for page, links in pages.items() for link in links.dead(pages)] == []
    assert sorted({link for links in pages.values() for link in links.loaded_from_elsewhere()}) == []
    settings = (tmp_path / "site/docs/reference/settings.html").read_text(encoding="utf-8")
    commands = (tmp_path / "site/docs/reference/commands.html").read_text(encoding="utf-8")
    api = (tmp_path / "site/docs/reference/api.html").read_text(encoding="utf-8")
    notebook = (tmp_path / "site/docs/notebooks/first_steps.html").read_text(encoding="utf-8")
    assert "data.sources.0.space_prefix_probability" in settings
    assert "--allow-rejected" in commands
    assert 'id="model.ops.masked_cross_attention"' in api
    assert notebook.count("data:image/png;base64,") > 20


class Links(HTMLParser):
    """Collect the links, anchors and loaded files of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.page, self.links, self.anchors, self.loaded = page, set[str](), set[str](), set[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links, names or loads."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag in ("img", "link", "script", "source"):
            self.loaded |= {values[name] for name in ("href", "src") if name in values}

    def dead(self, pages: dict[Path, Links]) -> list[str]:
        """Return the links and loaded files of this site that do not exist."""
        found = []
        for link in self.links | self.loaded:
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:|//|$", path) and (path or not anchor):
                continue
            target = (self.page.parent / path.partition("?")[0]).resolve() if path else self.page
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                found.append(link)
        return found

    def loaded_from_elsewhere(self) -> list[str]:
        """Return what the page loads from other hosts."""
        return [link for link in self.loaded if re.match(r"https?:|//", link)]
