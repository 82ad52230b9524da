"""Check the language of the sources: spelling, and docstrings that begin like a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.project.commands import ROOT
from tests.project.test_sources import python_files, tracked_text_files, tree_of

# British spellings, as regular expressions. The project writes American English.
BRITISH = (
    r"artefact\w*",
    r"behaviour\w*",
    r"cancell(?:ed|ing)",
    r"catalogue\w*",
    r"centr(?:e|es|ed|ing)",
    r"colour\w*",
    r"favour\w*",
    r"grey\w*",
    r"honour\w*",
    r"(?:general|initial|local|minim|maxim|normal|optim|organ|parallel|quant)is(?:e|ed|er|ers|es|ing|ation|ations)",
    r"(?:random|recogn|serial|special|summar|synchron|token|util|vector|visual)is(?:e|ed|er|ers|es|ing|ation|ations)",
    r"judgement\w*",
    r"labell(?:ed|ing)",
    r"learnt",
    r"licence\w*",
    r"misspelt",
    r"modell(?:ed|ing)",
    r"neighbour\w*",
    r"programme[sd]?",
    r"travell(?:ed|ing)",
    r"whilst",
)


def test_the_spelling_is_american() -> None:
    british = re.compile(rf"\b(?:{'|'.join(BRITISH)})\b", flags=re.IGNORECASE)
    exempt = {ROOT / "LICENSE", ROOT / "tests/project/test_language.py"}
    found = []
    for path in tracked_text_files():
        if path in exempt or path.suffix == ".json":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number} {word}" for word in british.findall(line)]
    assert found == []


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield place and text of every docstring of modules, classes and functions."""
    for path in python_files("model", "trainer"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}"
                text = ast.get_docstring(node)
                if text:
                    yield name, text


def test_docstrings_begin_like_a_sentence() -> None:
    assert [name for name, text in docstrings() if re.match(r"[a-z]", text)] == []


def test_docstrings_have_a_summary_of_one_line() -> None:
    assert [name for name, text in docstrings() if not text.splitlines()[0].endswith(".")] == []
