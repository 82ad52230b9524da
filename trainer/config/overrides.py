"""Dotted command-line settings (``--data.sources.0.batch_size 8``), applied to the mapping that the YAML gave.

They go into the mapping before anything is validated, and not through an argument parser over the validated result:
so a setting that the file leaves out may be given on the command line, and the errors of both come in one list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.yaml_file import KeyPath, parse_scalar
from trainer.errors import Problem


@dataclass(frozen=True)
class Override:
    """One setting from the command line. ``text``: the single word that was written, None for flags and lists."""

    path: KeyPath
    value: Any
    text: str | None


def parse_overrides(arguments: Sequence[str], values: dict[str, Any]) -> tuple[list[Override], list[Problem]]:
    """What the command line sets.

    ``--key value``, ``--key=value``, ``--key a b`` for lists and ``--key`` alone for true. Dashes and underscores in
    names are the same. An element of a list goes by its number or by its ``name`` (``--data.sources.mmc4.weight``).

    values: the mapping the settings will be applied to; tells list elements by name and number.
    """
    overrides: list[Override] = []
    problems: list[Problem] = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            problems.append(Problem("", f"unexpected {word!r}; settings look like --section.key VALUE", "command line"))
            continue
        name, equals, inline = word[2:].partition("=")
        texts = [inline] if equals else []
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            texts.append(arguments[position])
            position += 1
        value: Any = True if not texts else [parse_scalar(text) for text in texts] if len(texts) > 1 else None
        if len(texts) == 1:
            value = parse_scalar(texts[0])
        path, problem = _resolve(name, values)
        if problem is None:
            overrides.append(Override(path, value, texts[0] if len(texts) == 1 else None))
        else:
            problems.append(problem)
    return overrides, problems


def _resolve(name: str, values: dict[str, Any]) -> tuple[KeyPath, Problem | None]:
    """The dotted name as a path into ``values``; elements of lists become numbers."""
    node: Any = values
    path: list[str | int] = []
    for raw in name.split("."):
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            if raw.isdigit() and int(raw) < len(node):
                index = int(raw)
            elif raw in names:
                index = names.index(raw)
            else:
                here = ".".join(map(str, path))
                known = ", ".join(str(item) for item in names if item) or "none"
                message = f"has no element {raw!r}; it has {len(node)} (named {known})"
                return (), Problem(here, message, "command line")
            path.append(index)
            node = node[index]
            continue
        key = raw.replace("-", "_")
        path.append(raw if isinstance(node, dict) and raw in node else key)
        node = node.get(path[-1]) if isinstance(node, dict) else None
    return tuple(path), None


def apply_overrides(values: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of ``values`` with the settings in it; mappings that are not there yet (or are null) are made."""
    result: dict[str, Any] = _copy(values)
    for override in overrides:
        node: Any = result
        for segment, following in zip(override.path, override.path[1:], strict=False):
            if isinstance(segment, str) and not isinstance(node.get(segment), dict | list):
                node[segment] = {}
            node = node[segment]
            if isinstance(node, list) and not isinstance(following, int):
                break  # cannot happen after _resolve; keeps a list from being indexed by text
        else:
            node[override.path[-1]] = _copy(override.value)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def as_option(path: str, value: Any) -> list[str]:
    """The inverse: the words that set ``path`` to ``value`` (for scripts that start runs)."""
    return [f"--{path}", value if isinstance(value, str) else json.dumps(value)]
