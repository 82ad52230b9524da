"""Generate what the pages under docs/reference/ leave out: settings, commands and modules, as Markdown.

A page holds comments such as ``<!-- generated: settings -->``, which show nothing in the repository. ``docs/conf.py``
replaces them when it builds the site. Nothing generated is committed, so it cannot be out of date.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from types import ModuleType
from typing import Any
from unittest import mock

from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.help import example_settings, settings_help
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig

SETTINGS: dict[str, type[Any]] = {
    "trainer.train": FlamingoRunConfig,
    "trainer.pretrain_lm": LanguageModelRunConfig,
    "trainer.pretrain_vision": ContrastiveRunConfig,
    "trainer.evaluate": EvaluationConfig,
}
# Commands whose options are the settings of a YAML file; the text of their module says the rest.
WITH_YAML = (*SETTINGS, "trainer.zero_shot", "trainer.study")
COMMANDS = (
    *("trainer.train", "trainer.pretrain_lm", "trainer.pretrain_vision", "trainer.evaluate", "trainer.generate"),
    *("trainer.export", "trainer.import_model", "trainer.index", "trainer.convert", "trainer.inspect"),
    *("trainer.checkpoint", "trainer.doctor", "trainer.preflight", "trainer.supervise", "trainer.plan"),
    *("trainer.benchmark", "trainer.zero_shot", "trainer.study", "trainer.demo"),
)
PACKAGES = ("trainer.benchmark", "trainer.checkpoint")
_COMMENT = re.compile(r"^<!-- generated: (\w+)(?: (\S+))? -->$", flags=re.MULTILINE)
_OPTION = re.compile(r"^  --(\S+)(?: ([^\n]+))?\n((?: {8}.*\n?)*)", flags=re.MULTILINE)


def fill_in(text: str) -> str:
    """Return a page with its comments ``<!-- generated: ... -->`` replaced."""
    makers: dict[str, Callable[..., str]] = {"settings": settings, "commands": commands, "module": module}
    return _COMMENT.sub(lambda found: makers[found[1]](*found.groups()[1:][: found[2] is not None]), text)


def navigation(index: str) -> str:
    """Return the site's navigation: each list of links under a heading of the index becomes a part of it."""
    parts, listed = [], set()
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        links = re.findall(r"^- \[(.+?)\]\((?!http)([^)#]+)\.(?:md|ipynb)(?:#\S*)?\)", section, flags=re.MULTILINE)
        entries = [f"{title} <{page}>" for title, page in links if page not in listed]
        listed |= {page for _, page in links}
        if entries:
            options = f":hidden:\n:caption: {section.splitlines()[0]}\n"
            parts.append("```{toctree}\n" + options + "\n" + "\n".join(entries) + "\n```\n")
    return "\n" + "\n".join(parts)


def settings() -> str:
    """Return every setting of the four kinds of run, with type, default and meaning."""
    text, known = "", dict[str, tuple[str, str]]()
    for command, schema in SETTINGS.items():
        introduction, sections = _settings_of(schema)
        text += f"\n## {command}\n\n{escaped(introduction)}\n"
        for name, table in sections:
            key = name or command
            if known.setdefault(key, (command, table))[1] == table and known[key][0] != command:
                text += f"\n`{name}`: as for `{known[key][0]}`.\n"
            else:
                text += (f"\n### {name}\n" if name else "") + table
    return text


def _settings_of(schema: type[Any]) -> tuple[str, list[tuple[str, str]]]:
    """Return what the help says first, and each section's name and content."""
    with mock.patch.dict(os.environ, COLUMNS="100"):
        text = settings_help(example_settings(schema))
    introduction, *parts = re.split(r"^ ([\w.]+ )?options\n -+\n", text, flags=re.MULTILINE)
    names, bodies = parts[::2], parts[1::2]
    return introduction.strip(), [
        ((name or "").strip(), _section(body)) for name, body in zip(names, bodies, strict=True)
    ]


def _section(body: str) -> str:
    """Return the description of a section of the help and the table of its settings."""
    description, line, options = body.partition("\n  ------")
    described, options = (description, options) if line else ("", body)
    same = re.match(r"  Same options as (\S+?), (.*)\n?", options)
    if same:
        values = re.findall(r"^  --(\S+) (.*)$", options, flags=re.MULTILINE)
        changed = "; ".join(f"`{name}` {escaped(value)}" for name, value in values)
        described = f"Same settings as `{same[1]}`, {same[2].rstrip(':')}" + (f": {changed}." if changed else "")
        return f"\n{described}\n"
    rows = [_row(*found) for found in _OPTION.findall(options) if found[0] != "help"]
    text = " ".join(described.split())
    table = "| setting | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    return (f"\n{escaped(text)}\n" if text else "") + f"\n{table}"


def _row(name: str, kind: str, words: str) -> str:
    meaning = " ".join(words.split())
    found = re.search(r"\(default: (.*)\)$", meaning)
    default = found[1] if found else ""
    meaning = meaning[: found.start()].strip() if found else meaning
    kind = kind.replace("|", " or ").replace(",", ", ").strip("{}")
    return f"| `{name}` | {escaped(kind)} | {escaped(default)} | {escaped(meaning)} |"


def commands() -> str:
    """Return the commands with what their ``--help`` prints."""
    return "".join(f"\n## {name}\n{_command(name)}" for name in COMMANDS)


def _command(name: str) -> str:
    loaded = importlib.import_module(f"{name}.__main__" if name in PACKAGES else name)
    if name not in WITH_YAML:
        return f"\n```text\n{help_of(loaded)}\n```\n"
    settings_page = f"[{name}](settings.md#{name.replace('.', '')})" if name in SETTINGS else "its file"
    said = re.sub(r"``(.*?)``", r"`\1`", inspect.getdoc(loaded) or "")
    return f"\n{said}\n\n`--help` lists the settings of {settings_page}.\n"


def help_of(loaded: ModuleType) -> str:
    """Return what a command prints for ``--help``, without starting a process."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), redirect_stdout(printed), suppress(SystemExit):
        loaded.main(["--help"])
    return printed.getvalue().strip()


def module(name: str) -> str:
    """Return a heading and the directive that documents a module from its docstrings."""
    return f"\n### {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```"


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it stands, also in a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#$~])", r"\\\1", text)
