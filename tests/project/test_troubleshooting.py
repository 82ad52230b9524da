"""docs/troubleshooting.md lists messages that the sources print, each with a test that exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from typing import NamedTuple

import pytest

from tests.project.commands import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ROOMS = ("trainer", "model", "launch_scripts")
VALUE = "…"  # stands for a value, in the page and here
MIN_LITERAL = 10  # characters of a message that are no values
_PERCENT_FORMAT = re.compile(r"%(?:\.\d+)?[sdrgfa]")
_SHELL_VALUE = re.compile(r"\$\{[^}]*\}|\$\w+|\$\([^)]*\)")


class Line(NamedTuple):
    """Hold one line of the page."""

    message: str
    cause: str
    cure: str
    tests: list[str]


def lines_of(text: str) -> list[Line]:
    """Return the lines of all tables of a page in Markdown."""
    lines = []
    for row in re.findall(r"^\| `.*\|$", text, flags=re.MULTILINE):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 4, f"a line needs message, cause, cure and test: {row}"
        message, cause, cure, tests = cells
        lines.append(Line(message.strip("`").replace("\\|", "|"), cause, cure, re.findall(r"`([^`]+)`", tests)))
    return lines


@cache
def templates() -> tuple[str, ...]:
    """Return every text of the sources, with values replaced by "…"."""
    found: list[str] = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix == ".py":
                found += python_texts(path.read_text())
            elif path.suffix in (".sh", ".sbatch"):
                found.append(_SHELL_VALUE.sub(VALUE, path.read_text()))
    return tuple(found)


def python_texts(source: str) -> Iterator[str]:
    """Yield every string of a Python file, f-strings and %-formats with their values replaced."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _PERCENT_FORMAT.sub(VALUE, node.value)


def occurs(message: str, texts: Iterable[str]) -> bool:
    """Return whether one of the texts contains the parts of the message between its values, in their order."""
    parts = [part.strip() for part in message.split(VALUE) if part.strip()]
    assert sum(map(len, parts)) >= MIN_LITERAL, f"{message!r} is too short to search for"
    return any(_contains(text, parts) for text in texts)


def _contains(text: str, parts: list[str]) -> bool:
    position = 0
    for part in parts:
        found = text.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return True


LINES = lines_of(PAGE.read_text())


@pytest.mark.parametrize("message", [line.message for line in LINES])
def test_the_sources_print_the_message(message: str) -> None:
    assert occurs(message, templates())


@pytest.mark.parametrize("name", sorted({test for line in LINES for test in line.tests}))
def test_the_named_test_exists(name: str) -> None:
    file, _, function = name.partition("::")
    path = ROOT / file
    assert path.is_file(), f"{file} does not exist"
    names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert function in names, f"{file} has no {function}"
    assert function.startswith("test_")


def test_every_line_is_complete_and_no_message_is_there_twice() -> None:
    assert len(LINES) > 40
    for line in LINES:
        assert line.cause and line.cure and line.tests, line
    messages = sorted(line.message for line in LINES)
    assert [message for message, same in groupby(messages) if len(list(same)) > 1] == []


def test_messages_are_found_by_their_parts() -> None:
    source = 'a = f"no such file: {path}; write it with " f"{command}"\nlog("step %d was skipped: %s", 1, 2)\n'
    texts = list(python_texts(source))
    assert occurs("no such file: …; write it with …", texts)
    assert occurs("step … was skipped", texts)
    assert not occurs("no such file: … was skipped", texts)
    assert not occurs("write it with no such file", texts)
    with pytest.raises(AssertionError, match="too short"):
        occurs("… with …", texts)
