"""Print ``--help``: every setting with its type, its documentation and its value in the given file."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from trainer.config.contrastive_config import ClassificationConfig, RetrievalConfig, ZeroShotConfig
from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource, TextSource, VideoTextSource
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.evaluation_tasks import BaseTask, Bound, PromptTexts, TaskSettings
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, TrainingConfig
from trainer.config.study_config import StudyConfig
from trainer.errors import ConfigError

C = TypeVar("C")

_INTRODUCTION = """\
Settings come from the YAML file. The options below change them for this run; - and _ are the same in names.
List elements go by number or by name: --data.sources.0.weight 0.5, --data.sources.mmc4.weight 0.5.
"""
_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
_INDENT = " " * 8  # of the text below an option, in tyro's layout
_registry = ConstructorRegistry()


def print_help(schema: type[C], file: Path | None) -> None:
    """Print all settings of ``schema`` with their values in ``file``, or in an example if there is no readable file."""
    program = _program_name()
    print(f"usage: {program} CONFIG.yaml [--section.key VALUE ...]\n\n{_INTRODUCTION}")
    values = example_settings(schema)
    if file is not None:
        try:
            values = load_config(file, [], schema, check_files=False)
        except ConfigError as error:
            print(f"{error}\n\nThe values below are those of an example.\n", file=sys.stderr)
    print(settings_help(values))


def settings_help(values: object) -> str:
    """Return the help of all settings of a dataclass; its values are the defaults that the help shows."""
    _, _, text = _printed_by_tyro(values).partition("\n\n")  # drops tyro's usage line, which lacks CONFIG.yaml
    text = "\n".join(line.rstrip() for line in text.splitlines())
    # On narrow terminals, tyro begins the help text of an option on the option's line.
    text = re.sub(r"^(  -\S+(?: \S+)*)  +(?=\S)", rf"\1\n{_INDENT}", text, flags=re.MULTILINE)
    text = _in_words_of_yaml(text.replace("``", ""))
    text = re.sub(rf"(?:^{_INDENT}.*\n?)+", lambda paragraph: _rewrap(paragraph[0]), text, flags=re.MULTILINE)
    return "\n\n".join(_sections(text))


def _printed_by_tyro(values: object) -> str:
    printed = io.StringIO()
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    # tyro exits after printing.
    with redirect_stdout(printed), suppress(SystemExit):
        tyro.cli(
            type(values), default=values, args=["--help"], use_underscores=True, config=markers, registry=_registry
        )
    return printed.getvalue()


def _in_words_of_yaml(text: str) -> str:
    """Replace Python's words by those that the command line and YAML take."""
    text = text.replace("{None}", "null").replace("(default: )", "(default: [])")
    return re.sub(r"\b(None|True|False)\b", lambda word: _YAML_WORDS[word[0]], text)


def _rewrap(paragraph: str) -> str:
    """Wrap the help of one option again: tyro keeps line breaks of docstrings, and breaks within ``(default: ...)``."""
    words = " ".join(paragraph.split())
    words = re.sub(r"\(default: .{1,60}\)$", lambda default: default[0].replace(" ", "\N{NO-BREAK SPACE}"), words)
    width = max(60, shutil.get_terminal_size().columns)
    filled = textwrap.fill(words, width, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)
    return filled.replace("\N{NO-BREAK SPACE}", " ") + "\n"


def _sections(text: str) -> Iterator[str]:
    """Yield the sections of the help; a list element with the options of an earlier one names only other values."""
    seen: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for section in re.split(r"\n+(?= [\w.]+ options\n)", text):
        name = section.split()[0]
        options = re.findall(r"^  (--[a-z]\S*).*?\(default: (.*?)\)$", section, flags=re.MULTILINE | re.DOTALL)
        kind = tuple(re.sub(r"\.\d+\.", ".N.", option) for option, _ in options)
        first, values = seen.setdefault(kind, (name, [value for _, value in options]))
        if first == name:
            yield section
            continue
        changed = [
            f"  {option} {value}" for (option, value), other in zip(options, values, strict=True) if value != other
        ]
        same = f"  Same options as {first}, " + ("with other values:" if changed else "with the same values.")
        yield "\n".join([*section.split("\n")[:2], same, *changed])


@_registry.primitive_rule
def _mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Tell tyro how to show a setting that takes a mapping; without this rule it leaves the setting out."""
    members = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else (info.type,)
    if not any(get_origin(member) is dict for member in members):
        return None
    names = {NoneType: "{None}", Path: "PATH", str: "STR"}
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(names.get(member, "MAPPING") for member in members),
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [json.dumps(value) if isinstance(value, dict) else str(value)],
    )


def _program_name() -> str:
    module = sys.modules["__main__"].__spec__
    return f"python -m {module.name}" if module is not None else Path(sys.argv[0]).name


def example_settings(schema: type[C]) -> C:
    """Return settings with one source or task of each kind that ``schema`` takes."""
    manifest = Path("data/example/manifest.npz")
    settings: dict[str, Any]
    if schema is EvaluationConfig:
        settings = {"model": Path("runs/example/export"), "output": Path("runs/example"), "tasks": _example_tasks()}
    elif schema is StudyConfig:
        variants: dict[str, Any] = {"paper": {}, "attend-all": {"model.cross_attention.attend": "all"}}
        settings = {"base": Path("configs/example.yaml"), "output": Path("runs/study"), "baseline": "paper"}
        settings["variants"] = variants
    else:
        common: dict[str, Any] = {"batch_size": 64, "manifest": manifest}
        pairs, texts = ImageTextSource(name="pairs", **common), TextSource(name="texts", **common)
        videos = VideoTextSource(name="videos", **common)
        documents = InterleavedSource(name="documents", **common)
        every_kind = (pairs, documents, videos, texts)
        sources = {FlamingoRunConfig: every_kind, ContrastiveRunConfig: (pairs,)}.get(schema, (texts,))
        training = TrainingConfig(steps=1000)
        settings = {"run_dir": Path("runs/example"), "data": DataConfig(sources=sources), "training": training}
        if schema is ContrastiveRunConfig:
            settings["zero_shot"] = _example_zero_shot()
    return schema(**settings)


def _example_zero_shot() -> ZeroShotConfig:
    folder = Path("data/example")
    retrieval = RetrievalConfig("captions", captions=folder / "captions.json", images=folder / "images")
    return ZeroShotConfig(classification=(ClassificationConfig("classes", folder / "classes"),), retrieval=(retrieval,))


def _example_tasks() -> tuple[BaseTask, ...]:
    """Return a task of each kind, so that the help shows all of their settings."""
    tasks = []
    for kind in get_args(get_args(TaskSettings)[0]):
        required = [entry.name for entry in fields(kind) if entry.default is MISSING and entry.name != "name"]
        paths = {name: Path(f"data/example/{name}") for name in required}
        tasks.append(kind(name=kind.type, prompt=PromptTexts(), bounds=(Bound(),), **paths))
    return tuple(tasks)
