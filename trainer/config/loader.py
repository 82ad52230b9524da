"""Load the settings of a run from a YAML file and dotted overrides.

The steps are: YAML, overrides, the preset under ``model.preset``, pydantic, ``~`` and variables in paths, checks across
settings. One ``ConfigError`` reports everything that is wrong, before torch is imported. Relative paths are relative to
the current directory, not to the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from model.presets import PRESETS, get_preset
from trainer.config.batch_sizes import world_size_problems
from trainer.config.checks.all_checks import check_settings
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.overrides import COMMAND_LINE, Override, apply_overrides, parse_overrides
from trainer.config.path_settings import expand_path, expand_paths
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig, RunConfig
from trainer.config.study_config import StudyConfig
from trainer.config.validation import dotted, validate
from trainer.config.yaml_file import KeyPath, YamlFile, read_yaml
from trainer.errors import ConfigError, Problem

C = TypeVar("C")


def load_config(path: Path, overrides: Sequence[str], schema: type[C], *, check_files: bool = True) -> C:
    """Return the settings of a run.

    Args:
        path: YAML file.
        overrides: Rest of the command line ("--training.steps", "10").
        schema: Dataclass of the settings.
        check_files: Whether manifests, local model folders and optional libraries must exist. False suits a machine
            that will not run the configuration.

    Raises:
        ConfigError: The file or the command line is wrong; the error lists every problem.
    """
    file = read_yaml(path)
    given, problems = parse_overrides(overrides)
    values, paths, misplaced = apply_overrides(file.values, given)
    values, unknown_preset = _expand_preset(values, schema)
    config, messages = validate(values, schema)
    if config is None and _keep_as_text(messages, given, paths):
        values, _ = _expand_preset(apply_overrides(file.values, given)[0], schema)
        config, messages = validate(values, schema)
    found = [Problem(dotted(key), text) for key, text in messages.items()]
    if config is None:
        # Check the well-formed settings too, so that one start of the program shows every problem.
        config, _ = validate(_without(values, messages), schema)
    if config is not None:
        config, unexpanded = expand_paths(config, dict(os.environ))
        found += unexpanded
        reported = {problem.path for problem in unexpanded}
        # A section with a wrong key was checked with a default in its place: its other problems may be consequences.
        touched = {dotted(key).rpartition(".")[0] for key in messages}
        for problem in check_settings(config, check_files=check_files):
            sections = {name.rpartition(".")[0] for name in (problem.path, *problem.related)}
            if not sections & touched and problem.path not in reported:
                found.append(problem)
    problems += misplaced + unknown_preset + found
    if problems:
        raise ConfigError([_locate(problem, file, paths) for problem in problems], title=str(path))
    assert config is not None
    return config


def _keep_as_text(messages: dict[KeyPath, str], given: list[Override], paths: list[KeyPath]) -> bool:
    """Take overrides as text where the setting needs text (``--run_dir 20261123``); return whether any changed."""

    def wants_text(path: KeyPath) -> bool:
        return any(word in messages.get(path, "") for word in ("string", "path"))

    changed = False
    for index, (override, path) in enumerate(zip(given, paths, strict=True)):
        value = override.value
        if isinstance(override.text, list):
            items = zip(override.value, override.text, strict=True)
            value = [text if wants_text((*path, number)) else item for number, (item, text) in enumerate(items)]
        elif wants_text(path) and override.text is not None and override.value is not None:
            value = override.text
        if value != override.value:
            given[index] = replace(override, value=value)
            changed = True
    return changed


def _without(values: Any, messages: dict[KeyPath, str]) -> Any:
    """Return the mapping without its wrong keys."""

    def prune(node: Any, path: KeyPath) -> Any:
        if isinstance(node, dict):
            return {key: prune(item, (*path, key)) for key, item in node.items() if (*path, key) not in messages}
        if isinstance(node, list):
            return [prune(item, (*path, i)) for i, item in enumerate(node) if (*path, i) not in messages]
        return node

    return prune(values, ())


def _locate(problem: Problem, file: YamlFile, overridden: list[KeyPath]) -> Problem:
    """Return the problem with its file and line, or with "command line"."""
    if problem.source or not problem.path:
        return problem
    key: KeyPath = tuple(int(part) if part.isdigit() else part for part in problem.path.split("."))
    from_command_line = any(
        # A section that only the command line names ("--optimzer.eps 1") is wrong on the command line.
        path and (key[: len(path)] == path or (path[: len(key)] == key and key not in file.lines))
        for path in overridden
    )
    source = COMMAND_LINE if from_command_line else file.where(key)
    return Problem(problem.path, problem.message, source, problem.related)


def _expand_preset(values: dict[str, Any], schema: type) -> tuple[dict[str, Any], list[Problem]]:
    """Replace ``model`` by the values of ``model.start_from`` or ``model.preset``, with the user's values over them."""
    model = values.get("model")
    if not issubclass(schema, FlamingoRunConfig) or not isinstance(model, dict):
        return values, []
    if isinstance(model.get("start_from"), str):
        expanded = _expand_export(values, model)
        if expanded is not None:
            return expanded
    if model.get("preset") is None:
        return values, []
    name = model["preset"]
    if name not in PRESETS:
        return values, [Problem("model.preset", f"there is no preset {name!r}; there are {', '.join(sorted(PRESETS))}")]
    base = get_preset(name).to_dict()
    language_model = model.get("language_model")
    if isinstance(language_model, dict) and ("name" in language_model) != ("architecture" in language_model):
        # A pretrained language model replaces the preset's random one, and vice versa.
        base["language_model"].update(name=None, architecture=None)
    return {**values, "model": _merge(base, model)}, []


def _expand_export(values: dict[str, Any], model: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]] | None:
    """Replace ``model`` by the settings of the export that it starts from, with the user's values over them.

    Where there is no such folder, return None: the check of files reports it, and a plan needs the preset only.
    """
    try:
        folder = expand_path(model["start_from"], dict(os.environ))
        if not Path(folder).is_dir():
            return None
        from model.pretrained import describe_export  # takes seconds, and few runs need it

        base = json.loads(json.dumps(describe_export(folder).config.to_dict()))
    except (OSError, ValueError) as error:
        return values, [Problem("model.start_from", str(error))]
    return {**values, "model": _merge(base, model)}, []


def _merge(base: Any, over: Any) -> Any:
    if (
        isinstance(base, dict)
        and isinstance(over, dict)
        and over.get("model_type", base.get("model_type")) == base.get("model_type")
    ):
        return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}
    return over


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Check that this number of processes divides the batch of every source.

    Raises:
        ConfigError: It does not; the error names the possible numbers.
    """
    problems = world_size_problems(config, world_size)
    if problems:
        raise ConfigError(problems, title=f"a world of {world_size} processes")


def config_to_yaml(config: object) -> str:
    """Return the resolved settings as YAML, from which ``load_config`` reads the same settings."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=120)


def to_plain(config: Any) -> dict[str, Any]:
    """Return a dataclass of settings as values that YAML and JSON can hold: paths become text, tuples lists."""
    return json.loads(json.dumps(asdict(config), default=str))


def schema_of(values: Mapping[str, Any]) -> type:
    """Return the schema of a YAML mapping, by its ``task`` or by sections that only one schema has."""
    schemas: dict[Any, type] = {
        "flamingo": FlamingoRunConfig,
        "language_model": LanguageModelRunConfig,
        "contrastive": ContrastiveRunConfig,
    }
    if values.get("task") in schemas:
        return schemas[values["task"]]
    if "tasks" in values:
        return EvaluationConfig
    if "variants" in values:
        return StudyConfig
    if "architecture" not in values:
        return FlamingoRunConfig
    sources = (values.get("data") or {}).get("sources") or [{}]
    return LanguageModelRunConfig if sources[0].get("type") == "text" else ContrastiveRunConfig
