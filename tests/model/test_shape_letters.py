"""Check that shapes in names use the letters that ``model/__init__.py`` explains."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import model

FOLDER = Path(model.__file__).parent


def legend() -> set[str]:
    """Return the letters that the package's docstring explains."""
    lines = re.findall(r"^ {4}((?:[A-Z], )*[A-Z]): ", model.__doc__ or "", re.MULTILINE)
    return {letter for line in lines for letter in line.split(", ")}


def shapes_in_names() -> dict[str, set[str]]:
    """Return the shapes at the end of names such as ``q_BLHK``, with the files that have them."""
    found: dict[str, set[str]] = {}
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            if shape := re.fullmatch(r"[a-z]\w*_([A-Z][A-Z0-9yx]*|[A-Z0-9]*[A-Z])", name):
                found.setdefault(shape[1], set()).add(path.name)
    return found


def test_every_letter_is_explained() -> None:
    known = legend()
    assert {"B", "L", "Y", "X"} <= known
    shapes = shapes_in_names()
    assert len(shapes) > 30
    unknown = {shape: files for shape, files in shapes.items() if set(re.findall("[A-Z]", shape)) - known}
    assert unknown == {}
