"""Make the relative paths of a command line absolute, for scripts that change the folder before they start a trainer.

``python -m trainer.config.caller_paths FOLDER CONFIG.yaml [--section.key VALUE ...]`` prints the words after FOLDER,
each followed by a null byte. Relative paths among them become paths below FOLDER. A configuration that FOLDER does not
have stays relative, so that a script finds the clone's own ``configs/``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.path_settings import TEXT_SETTINGS, TOWER_PREFIXES, path_settings
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig
from trainer.config.yaml_file import parse_scalar

_SCHEMAS = (FlamingoRunConfig, LanguageModelRunConfig, ContrastiveRunConfig, EvaluationConfig)


def absolute_arguments(arguments: Sequence[str], folder: Path) -> list[str]:
    """Return a command line with paths relative to ``folder`` made absolute."""
    result = list(arguments)
    if result and not result[0].startswith("-") and (folder / result[0]).exists():
        result[0] = str(folder / result[0])
    for index, word in enumerate(result):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            continue
        if equals:
            result[index] = f"--{name}={_absolute(name, value, folder)}"
        elif index + 1 < len(result) and not result[index + 1].startswith("--"):
            result[index + 1] = _absolute(name, result[index + 1], folder)
    return result


def _absolute(name: str, value: str, folder: Path) -> str:
    text = parse_scalar(value)
    if not isinstance(text, str) or text.startswith(("~", "$")):
        return value
    if any(_matches(name, setting) for schema in _SCHEMAS for setting in path_settings(schema)):
        return str(folder / text)
    if any(_matches(name, setting) for setting in TEXT_SETTINGS):
        prefix = next((prefix for prefix in TOWER_PREFIXES if text.startswith(prefix)), "")
        path = folder / text.removeprefix(prefix)
        return f"{prefix}{path}" if path.exists() else value
    return value


def _matches(name: str, setting: str) -> bool:
    """Return whether an option names a setting; a list element goes by its number or by its name."""
    words, pattern = name.replace("-", "_").split("."), setting.split(".")
    return len(words) == len(pattern) and all(p in (word, "0") for word, p in zip(words, pattern, strict=True))


if __name__ == "__main__":
    print("".join(f"{word}\0" for word in absolute_arguments(sys.argv[2:], Path(sys.argv[1]))), end="")
