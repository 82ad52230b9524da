"""Apply dotted command-line settings (``--data.sources.0.batch_size 8``) to the mapping from a YAML file.

They are applied before validation. Thus the command line can supply a setting that the file leaves out, and the errors
of both come in one list.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.yaml_file import KeyPath, parse_scalar
from trainer.errors import Problem

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Override:
    """Hold one setting from the command line.

    Attributes:
        name: Dotted name, as written.
        value: Value, as YAML reads it.
        text: Value, as written: one word, or the words of a list; None for flags.
    """

    name: str
    value: Any
    text: str | list[str] | None


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Parse a command line into settings and problems.

    The forms are ``--key value``, ``--key=value``, ``--key a b`` for lists and ``--key`` for true.
    """
    overrides: list[Override] = []
    problems: list[Problem] = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            problems.append(Problem("", f"unexpected {word!r}; settings look like --section.key VALUE", COMMAND_LINE))
            continue
        name, equals, inline = word[2:].partition("=")
        texts = [inline] if equals else []
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            texts.append(arguments[position])
            position += 1
        if len(texts) == 1:
            overrides.append(Override(name, parse_scalar(texts[0]), texts[0]))
        else:
            overrides.append(Override(name, [parse_scalar(text) for text in texts] or True, texts or None))
    return overrides, problems


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[Override]
) -> tuple[dict[str, Any], list[KeyPath], list[Problem]]:
    """Apply settings one after another to a copy of ``values``.

    Dashes and underscores in names are the same. A list element goes by its number or by its ``name``
    (``--data.sources.mmc4.weight``). Mappings that are missing or null are created.

    Returns:
        The mapping, the key path of each override (() for one that failed), and the problems.
    """
    result = copy.deepcopy(values)
    paths: list[KeyPath] = []
    problems: list[Problem] = []
    for override in overrides:
        path, message = _set(result, override.name.split("."), copy.deepcopy(override.value))
        paths.append(path if message is None else ())
        if message is not None:
            problems.append(Problem(".".join(map(str, path)), message, COMMAND_LINE))
    return result, paths, problems


def _set(values: dict[str, Any], names: list[str], value: Any) -> tuple[KeyPath, str | None]:
    """Set a value; return its key path and None, or the path up to the obstacle and a message."""
    node: Any = values
    path: list[str | int] = []
    for depth, name in enumerate(names):
        key: str | int
        if isinstance(node, list):
            found = _element(node, name)
            if isinstance(found, str):
                return tuple(path), found
            key = found
        else:
            key = name if name in node else name.replace("-", "_")
        path.append(key)
        if depth == len(names) - 1:
            node[key] = value
        elif isinstance(node, dict) and not isinstance(node.get(key), dict | list):
            node[key] = {}
        elif not isinstance(node[key], dict | list):
            return tuple(path), f"is {node[key]!r}, which has nothing named {names[depth + 1]!r}"
        node = node[key]
    return tuple(path), None


def _element(items: list[Any], name: str) -> int | str:
    """Return the index of a list element, or a message if there is none of that name."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if name.isdigit() and int(name) < len(items):
        return int(name)
    if name in names:
        return names.index(name)
    known = ", ".join(str(item) for item in names if item) or "none"
    return f"has no element {name!r}; it has {len(items)} (named {known})"
