"""Read YAML into plain mappings and remember the line of each key.

This differs from PyYAML's safe loader, which implements YAML 1.1:

- A duplicate key is an error; PyYAML keeps the last one silently.
- ``1e-4`` is a number; YAML 1.1 reads text, which a free-form ``architecture`` would pass on to the model.
- ``010`` is ten and ``1:30`` is text, as in YAML 1.2; YAML 1.1 reads 8 and 90.
- A date is text: no setting is a date, but names and folders look like one.

The line of every key is kept for error messages.
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
    """Subclass the safe loader, so that the rules below leave the YAML of other packages alone."""

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Return an integer; a leading zero does not make it octal."""
        text = str(self.construct_scalar(node)).replace("_", "")
        sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-")
        base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2].lower(), 10)
        return sign * int(digits, base)


_REPLACED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_INTEGER = re.compile(r"^[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|"
    r"\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)

# PyYAML's errors for a value that begins with a character of YAML's own syntax.
_SYNTAX_ERRORS = (
    "cannot start any token",
    "could not determine a constructor",
    "undefined alias",
    "expected alphabetic",
)


@dataclass
class YamlFile:
    """Hold the content of a YAML file.

    Attributes:
        path: The file.
        values: Its mapping.
        lines: Line of each key path, counted from 1.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Return ``file:line`` of a key, or of its nearest parent in the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.path}:{self.lines[path[:length]]}"
        return str(self.path)


def parse_scalar(text: str) -> Any:
    """Parse one value as YAML ("8", "1e-4", "true", "null", "[0.9, 0.95]"), or return the text as it was typed.

    Comments, anchors and tags of YAML are not looked for in text: ``runs/try #2`` stays as it is. Quotes around the
    whole text are removed, so that ``'"8"'`` is text.
    """
    if text == "~":  # the home folder; YAML reads null
        return text
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text.count(text[0]) == 2
    if (isinstance(value, str) and not is_quoted) or (value is None and text.lower() not in ("", "null")):
        return text
    return value


def read_yaml(path: Path) -> YamlFile:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: The file is missing, not UTF-8, not YAML or not a mapping, or it has duplicate keys.
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
        hint = "; put the value in quotes" if any(part in str(error.problem) for part in _SYNTAX_ERRORS) else ""
        raise fail(f"is not valid YAML: {error.problem}{hint}", mark.line + 1 if mark else None) from None
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
