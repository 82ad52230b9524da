"""YAML as plain mappings that remember where each key stood.

PyYAML's safe loader with three differences: a duplicate key is an error (it would silently keep the last one), ``1e-4``
is a number (YAML 1.1 reads it as text, which a free-form ``architecture`` mapping would carry into the model), and
the line of every key is kept for error messages.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """A safe loader of its own, so that the resolver below does not change everybody's YAML."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass
class YamlFile:
    """values: the file's mapping. lines: from a key path to its line, counted from 1."""

    path: Path
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """``file:line`` of the key, or of the nearest key above it that stands in the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.path}:{self.lines[path[:length]]}"
        return str(self.path)


def parse_scalar(text: str) -> Any:
    """One value as YAML reads it ("8", "1e-4", "true", "null", "[0.9, 0.95]"); what is not YAML stays text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> YamlFile:
    """The mapping in a YAML file.

    Raises ConfigError for a file that is missing, not UTF-8, not YAML or not a mapping, and for all its duplicate keys.
    """

    def fail(message: str, line: int | None = None) -> ConfigError:
        return ConfigError([Problem("", message, f"{path}:{line}" if line else str(path))])

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise fail("no such file") from None
    except UnicodeDecodeError as error:
        raise fail(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise fail(f"cannot be read ({error.strerror})") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        problems: list[Problem] = []
        if node is not None:
            _walk(node, (), str(path), lines, problems)
        if problems:
            raise ConfigError(problems)
        values = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise fail(f"is not valid YAML: {error.problem}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise fail(f"is not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise fail(f"must be a mapping of settings, not a {type(values).__name__}")
    return YamlFile(path, values, lines)


def _walk(node: yaml.Node, path: KeyPath, file: str, lines: dict[KeyPath, int], problems: list[Problem]) -> None:
    if isinstance(node, yaml.MappingNode):
        first_line: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            here = (*path, str(key))
            if str(key) in first_line:
                dotted = ".".join(map(str, here))
                message = f"stands here a second time; it was first set on line {first_line[str(key)]}"
                problems.append(Problem(dotted, message, f"{file}:{line}"))
            first_line.setdefault(str(key), line)
            lines.setdefault(here, line)
            _walk(value_node, here, file, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), file, lines, problems)
