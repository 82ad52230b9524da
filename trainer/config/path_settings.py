"""Expand ``~`` and environment variables in the settings that are paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from trainer.config.validation import dataclasses_in, dotted
from trainer.config.yaml_file import KeyPath
from trainer.errors import Problem

C = TypeVar("C")

# What vision.name has before a path: open_clip's folders, and those of transformers, which may also be repositories.
TOWER_PREFIXES = ("local-dir:", "transformers:")
# Settings of type str that may hold a path: each also takes a name on the hub, or a tag.
TEXT_SETTINGS = frozenset(
    {
        "model.language_model.name",
        "model.language_model.tokenizer",
        "model.start_from",
        "model.vision.name",
        "model.vision.pretrained",
    }
)
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")


def expand_path(text: str, environment: dict[str, str]) -> str:
    """Return a path with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` expanded.

    Raises:
        ValueError: A variable is not set, or there is no such user.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] if match[2] is None else match[2]
        if not name.isidentifier():
            raise ValueError(f"{match[0]} cannot be expanded; write $NAME or ${{NAME}}")
        if not environment.get(name):
            raise ValueError(f"the environment variable {name} is not set, or it is empty")
        return environment[name]

    prefix = next((prefix for prefix in TOWER_PREFIXES if text.startswith(prefix)), "")
    path = _VARIABLE.sub(value_of, text.removeprefix(prefix))
    try:
        return prefix + str(Path(path).expanduser()) if path.startswith("~") else prefix + path
    except RuntimeError:
        raise ValueError(f"there is no user of that name: {path}") from None


def expand_paths(config: C, environment: dict[str, str]) -> tuple[C, list[Problem]]:
    """Expand all paths in a dataclass of settings.

    Args:
        config: Settings, with nested dataclasses.
        environment: Values of the variables.

    Returns:
        The settings, and a problem for each path that cannot be expanded and stays as it is.
    """
    problems: list[Problem] = []

    def expanded(value: Any, path: KeyPath) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            before = {entry.name: getattr(value, entry.name) for entry in fields(value)}
            after = {name: expanded(item, (*path, name)) for name, item in before.items()}
            return replace(value, **after) if after != before else value
        if isinstance(value, tuple):
            return tuple(expanded(item, (*path, index)) for index, item in enumerate(value))
        if isinstance(value, Path) or (isinstance(value, str) and dotted(path) in TEXT_SETTINGS):
            try:
                return type(value)(expand_path(str(value), environment))
            except ValueError as error:
                problems.append(Problem(dotted(path), f"{str(value)!r}: {error}"))
        return value

    return expanded(config, ()), problems


def path_settings(schema: type) -> Iterator[str]:
    """Yield the dotted name of every setting that is a path; list elements have the number 0."""
    for entry, hint in get_type_hints(schema).items():
        classes, is_leaf, in_list = dataclasses_in(hint)
        if is_leaf and Path in (hint, *get_args(hint)):
            yield entry
        for cls in classes:
            for below in path_settings(cls):
                yield f"{entry}.0.{below}" if in_list else f"{entry}.{below}"
