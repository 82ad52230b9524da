"""From a YAML file and a command line to validated dataclasses: the only place that parses settings.

YAML -> dotted overrides -> the preset under ``model.preset`` -> pydantic -> checks across settings. What is wrong is
reported all at once (``ConfigError``), before torch is imported. Relative paths are relative to the current directory,
like every path on the command line, and not to the file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainer.config.cross_checks import check_settings, world_size_problems
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.overrides import COMMAND_LINE, Override, apply_overrides, parse_overrides
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig, RunConfig
from trainer.config.validation import dotted, validate
from trainer.config.yaml_file import KeyPath, YamlFile, read_yaml
from trainer.errors import ConfigError, Problem

C = TypeVar("C")


def load_config(path: Path, overrides: Sequence[str], schema: type[C], *, check_files: bool = True) -> C:
    """The settings of a run.

    path: a YAML file. overrides: the rest of the command line ("--training.steps", "10").
    check_files: whether manifests, local model folders and optional libraries have to be there; off for looking at a
        configuration on a machine that will not run it.

    Raises: ConfigError with everything that is wrong in the file and on the command line.
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
        # What is well-formed is checked across settings too, so that one run of the program shows everything.
        config, _ = validate(_without(values, messages), schema)
    if config is not None:
        touched = {dotted(key).rpartition(".")[0] for key in messages}
        for problem in check_settings(config, check_files=check_files):
            sections = {name.rpartition(".")[0] for name in (problem.path, *problem.related)}
            if not sections & touched:
                found.append(problem)
    problems += misplaced + unknown_preset + found
    if problems:
        raise ConfigError([_locate(problem, file, paths) for problem in problems], title=str(path))
    assert config is not None
    return config


def _keep_as_text(messages: dict[KeyPath, str], given: list[Override], paths: list[KeyPath]) -> bool:
    """Where text is wanted and the command line looked like a number (``--run_dir 20261123``), take it as written."""
    changed = False
    for index, (override, path) in enumerate(zip(given, paths, strict=True)):
        wants_text = any(word in messages.get(path, "") for word in ("string", "path"))
        if wants_text and override.text is not None and not isinstance(override.value, str | None):
            given[index] = replace(override, value=override.text)
            changed = True
    return changed


def _without(values: Any, messages: dict[KeyPath, str]) -> Any:
    """The mapping less everything that is wrong in it."""

    def prune(node: Any, path: KeyPath) -> Any:
        if isinstance(node, dict):
            return {key: prune(item, (*path, key)) for key, item in node.items() if (*path, key) not in messages}
        if isinstance(node, list):
            return [prune(item, (*path, i)) for i, item in enumerate(node) if (*path, i) not in messages]
        return node

    return prune(values, ())


def _locate(problem: Problem, file: YamlFile, overridden: list[KeyPath]) -> Problem:
    """The same problem with the file and line, or "command line"."""
    if problem.source or not problem.path:
        return problem
    parts = problem.path.split(".") if problem.path else []
    key: KeyPath = tuple(int(part) if part.isdigit() else part for part in parts)
    from_command_line = any(
        # A section that only the command line names ("--optimzer.eps 1") is wrong there, too.
        path and (key[: len(path)] == path or (path[: len(key)] == key and key not in file.lines))
        for path in overridden
    )
    source = COMMAND_LINE if from_command_line else file.where(key)
    return Problem(problem.path, problem.message, source, problem.related)


def _expand_preset(values: dict[str, Any], schema: type) -> tuple[dict[str, Any], list[Problem]]:
    """``model.preset`` as the preset's values with the user's laid over them."""
    model = values.get("model")
    if not issubclass(schema, FlamingoRunConfig) or not isinstance(model, dict) or model.get("preset") is None:
        return values, []
    from model.presets import PRESETS, preset

    name = model["preset"]
    if name not in PRESETS:
        return values, [Problem("model.preset", f"there is no preset {name!r}; there are {', '.join(sorted(PRESETS))}")]
    base = preset(name).to_dict()
    language_model = model.get("language_model")
    if isinstance(language_model, dict) and ("name" in language_model) != ("architecture" in language_model):
        # Naming a pretrained language model replaces the preset's random one, and the other way round.
        base["language_model"].update(name=None, architecture=None)
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
    """Whether this number of processes divides every source's batch.

    Raises: ConfigError with the sizes that are possible.
    """
    problems = world_size_problems(config, world_size)
    if problems:
        raise ConfigError(problems, title=f"a world of {world_size} processes")


def config_to_yaml(config: object) -> str:
    """The resolved settings as YAML; ``load_config`` of it gives the same settings."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=120)


def to_plain(config: Any) -> dict[str, Any]:
    """A settings dataclass as what YAML and JSON can hold: paths become text, tuples lists."""
    return json.loads(json.dumps(asdict(config), default=str))


def schema_of(values: Mapping[str, Any]) -> type:
    """Which trainer's settings a YAML mapping holds: by its ``task``, or else by the sections only one of them has."""
    schemas: dict[Any, type] = {
        "flamingo": FlamingoRunConfig,
        "language_model": LanguageModelRunConfig,
        "contrastive": ContrastiveRunConfig,
    }
    if values.get("task") in schemas:
        return schemas[values["task"]]
    if "tasks" in values:
        return EvaluationConfig
    if "architecture" not in values:
        return FlamingoRunConfig
    sources = (values.get("data") or {}).get("sources") or [{}]
    return LanguageModelRunConfig if sources[0].get("type") == "text" else ContrastiveRunConfig


def parse_arguments(schema: type[C], argv: Sequence[str] | None = None) -> C:
    """The command line of an entry point: ``CONFIG.yaml [--section.key VALUE ...]``; None takes ``sys.argv``.

    ``--local_rank``, which the deepspeed launcher adds, is ignored: LOCAL_RANK says the same. ``--help`` prints every
    setting with the value that CONFIG.yaml gives it. Wrong settings are printed and exit with code 2.
    """
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    file = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else None
    if "--help" in arguments or "-h" in arguments:
        from trainer.config.help import print_help

        print_help(schema, file)
        raise SystemExit(0)
    try:
        if file is None:
            message = "the first argument must be the run's YAML file; --help lists all settings"
            raise ConfigError([Problem("", message, COMMAND_LINE)], title="the command line")
        return load_config(file, arguments, schema)
    except ConfigError as error:
        # Every process of a node would say the same; on another node the missing file may be another one.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """The arguments less ``--local_rank N``, ``--local-rank N`` and their ``=`` forms."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in ("--local_rank", "--local-rank"):
            skip = True
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept
