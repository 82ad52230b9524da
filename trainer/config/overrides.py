"""Dotted command-line settings (``--data.sources.0.batch_size 8``), applied to the mapping that the YAML gave.

They go into the mapping before anything is validated, and not through an argument parser over the validated result:
so a setting that the file leaves out may be given on the command line, and the errors of both come in one list.
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
    """One setting from the command line.

    name: dotted, as written. value: as YAML reads it. text: the single word it was, None for flags and lists.
    """

    name: str
    value: Any
    text: str | None


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """What the command line sets: ``--key value``, ``--key=value``, ``--key a b`` for lists, ``--key`` for true."""
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
            overrides.append(Override(name, [parse_scalar(text) for text in texts] or True, None))
    return overrides, problems


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[Override]
) -> tuple[dict[str, Any], list[KeyPath], list[Problem]]:
    """A copy of ``values`` with the settings in it, one after the other.

    Dashes and underscores in names are the same. An element of a list goes by its number or by its ``name``
    (``--data.sources.mmc4.weight``). Mappings that are not there yet, or are null, are made.

    Returns the mapping, the key path that each override set (() where it could not), and what was wrong.
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
    """Put the value into its place; where that fails, how far the path went and why it ends there."""
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
    """The number of the element, or why there is none."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if name.isdigit() and int(name) < len(items):
        return int(name)
    if name in names:
        return names.index(name)
    known = ", ".join(str(item) for item in names if item) or "none"
    return f"has no element {name!r}; it has {len(items)} (named {known})"
