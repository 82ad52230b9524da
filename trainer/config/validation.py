"""Validate a mapping against the dataclasses of the settings.

pydantic does the checking. This module turns its errors into sentences with dotted names, and suggests the right name
for a misspelled one.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from trainer.config.yaml_file import KeyPath

T = TypeVar("T")


def dotted(path: KeyPath) -> str:
    """Return a key path as it is written on the command line."""
    return ".".join(map(str, path))


def validate(values: dict[str, Any], schema: type[T]) -> tuple[T | None, dict[KeyPath, str]]:
    """Return the settings as dataclasses of ``schema``, or None and a message for each wrong key path."""
    try:
        config = TypeAdapter(schema).validate_python(values)
        wrong = dict(_numbers_from_booleans(values, config, ()))
        return (None, wrong) if wrong else (config, {})
    except ValidationError as error:
        problems: dict[KeyPath, str] = {}
        for item in error.errors(include_url=False):
            path = _plain_path(item["loc"], values, item["type"])
            message = _message(item, path, values, schema)
            if path in problems and message not in problems[path]:
                message = f"{problems[path]}; or: {message}"  # one message from each member of a union
            problems[path] = message
        return None, problems


def _numbers_from_booleans(values: Any, config: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yield booleans given for numbers, which pydantic accepts: ``--training.steps`` without a number would mean 1."""
    if isinstance(values, dict):
        for key, value in values.items():
            below = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
            yield from _numbers_from_booleans(value, below, (*path, key))
    elif isinstance(values, list) and isinstance(config, tuple | list):
        for index, (value, below) in enumerate(zip(values, config, strict=False)):
            yield from _numbers_from_booleans(value, below, (*path, index))
    elif isinstance(values, bool) and not isinstance(config, bool):
        yield path, f"needs a number, not {str(values).lower()}"


def _plain_path(location: tuple[str | int, ...], values: Any, kind: str) -> KeyPath:
    """Return pydantic's location without the names of union members, which are not keys of the mapping."""
    path: list[str | int] = []
    node: Any = values
    for position, segment in enumerate(location):
        in_mapping = isinstance(node, dict) and segment in node
        in_list = isinstance(node, list | tuple) and isinstance(segment, int) and segment < len(node)
        if in_mapping or in_list:
            node = node[segment]
        elif not (kind == "missing" and position == len(location) - 1):
            continue
        path.append(segment)
    return tuple(path)


def _message(item: Any, path: KeyPath, values: dict[str, Any], schema: type) -> str:
    kind, shown = item["type"], repr(item["input"])
    match kind:
        case "unexpected_keyword_argument" | "no_such_attribute" | "extra_forbidden":
            return f"there is no such setting{_suggestion(path, values, schema)}"
        case "missing" | "missing_argument":
            return "is required and missing"
        case "union_tag_not_found":
            return f"needs a type: one of {item['ctx'].get('expected_tags', _tags(path, values, schema))}"
        case "union_tag_invalid":
            tag, expected = item["ctx"]["tag"], item["ctx"]["expected_tags"]
            options = [option.strip("'") for option in expected.split(", ")]
            return f"type {tag!r} is not one of {expected}{_did_you_mean(tag, options)}"
        case "literal_error":
            expected = item["ctx"]["expected"]
            options = [option.strip("'") for option in expected.replace(" or ", ", ").split(", ")]
            return f"{shown} is not one of {expected}{_did_you_mean(str(item['input']), options)}"
        case "dataclass_type" | "dict_type":
            return f"must be a mapping of settings, not {shown}"
    text = item["msg"][0].lower() + item["msg"][1:]
    return f"{text}, not {shown}" if len(shown) < 100 else text


def _tags(path: KeyPath, values: dict[str, Any], schema: type) -> str:
    names = [tag for cls in _classes_at(path, values, schema) for tag in _literal_values(cls)]
    return ", ".join(map(repr, names))


def _suggestion(path: KeyPath, values: dict[str, Any], schema: type) -> str:
    """Suggest what an unknown key was meant to be: a similar neighbor, or the same name in another section."""
    name = str(path[-1])
    known = sorted({f.name for cls in _classes_at(path[:-1], values, schema) for f in fields(cls)})
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {dotted((*path[:-1], close[0]))}?"
    elsewhere = [other for other in setting_paths(schema) if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _did_you_mean(text: str, options: list[str]) -> str:
    close = difflib.get_close_matches(text, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def setting_paths(schema: type) -> Iterator[str]:
    """Yield the dotted path of every setting; list elements have the number 0."""
    for name, classes, is_leaf, in_list in _members(schema):
        if is_leaf:
            yield name
        for cls in classes:
            for below in setting_paths(cls):
                yield f"{name}.0.{below}" if in_list else f"{name}.{below}"


def _members(schema: type) -> Iterator[tuple[str, list[type], bool, bool]]:
    hints = get_type_hints(schema, include_extras=False)
    for entry in fields(schema):
        classes, is_leaf, in_list = dataclasses_in(hints[entry.name])
        yield entry.name, classes, is_leaf, in_list


def dataclasses_in(hint: Any) -> tuple[list[type], bool, bool]:
    """Return the dataclasses that a type hint allows, whether it allows other values, and whether it is a tuple."""
    origin = get_origin(hint)
    if origin is Annotated:
        return dataclasses_in(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        parts = [dataclasses_in(part) for part in get_args(hint)]
        return [cls for part in parts for cls in part[0]], all(part[1] for part in parts), any(p[2] for p in parts)
    if origin is tuple:
        classes, is_leaf, _ = dataclasses_in(get_args(hint)[0])
        return classes, is_leaf, bool(classes)
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint], False, False
    return [], True, False


def _classes_at(path: KeyPath, values: Any, schema: type) -> list[type]:
    """Return the dataclasses allowed at a key path; a ``type`` in the values narrows a union to one."""
    classes: list[type] = [schema]
    node: Any = values
    for segment in path:
        try:
            node = node[segment]
        except (KeyError, IndexError, TypeError):
            node = None
        if isinstance(segment, str):
            entries = [entry for parent in classes for entry in _members(parent)]
            classes = [cls for name, members, _, _ in entries if name == segment for cls in members]
        if isinstance(node, dict) and "type" in node:
            narrowed = [cls for cls in classes if node["type"] in _literal_values(cls)]
            classes = narrowed or classes
    return classes


def _literal_values(cls: type) -> tuple[Any, ...]:
    return get_args(get_type_hints(cls).get("type", Any))
