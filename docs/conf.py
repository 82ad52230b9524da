"""Configure Sphinx, which builds the site from the Markdown and notebooks of the repository (launch_scripts/docs.sh).

The root of the sources is the repository, so that links between docs/, README.md and csrc/README.md hold in the site
as they do in the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import generate  # noqa: E402  found through the path above

project = "flamingo-trainer"
html_title = project
root_doc = "docs/index"
include_patterns = ["*.md", "csrc/README.md", "docs/**.md", "docs/notebooks/*.ipynb"]
exclude_patterns = [
    ".*",
    "AGENTS.md",
    "build",
    "configs",
    "data",
    "launch_scripts",
    "model",
    "runs",
    "tests",
    "trainer",
    "wandb",
]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are committed: docs/run_notebooks.py
napoleon_google_docstring, napoleon_numpy_docstring, napoleon_use_ivar = True, False, True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# Signatures name types of other projects, and some of ours whose modules are not in the reference.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_show_copyright = html_show_sourcelink = html_copy_source = False

_FRONT = '<!DOCTYPE html><meta http-equiv="refresh" content="0; url={0}"><a href="{0}">{1}</a>\n'


def setup(app: Sphinx) -> None:
    """Connect what the pages leave to the build: the reference, the navigation and the front page."""
    app.connect("source-read", _fill_in)
    app.connect("build-finished", _write_front_page)


def _fill_in(app: Sphinx, page: str, content: list[str]) -> None:
    content[0] = generate.fill_in(content[0])
    if page == root_doc:
        content[0] += generate.navigation(content[0])


def _write_front_page(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        page = f"{root_doc}.html"
        (Path(app.outdir) / "index.html").write_text(_FRONT.format(page, project), encoding="utf-8")
