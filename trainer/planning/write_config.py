"""Write a run's YAML with the settings that the search found."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.config.loader import load_config, schema_of
from trainer.config.overrides import apply_overrides, parse_overrides
from trainer.config.yaml_file import read_yaml

# What a setting is when a file leaves it out. Defaults are not written.
_DEFAULTS = {
    "deepspeed.hpz_partition_size": 1,
    "deepspeed.frozen": None,
    "deepspeed.offload_param.device": "none",
    "deepspeed.offload_optimizer.device": "none",
    "training.activation_checkpointing": False,
}


def write_config(source: Path, overrides: Sequence[str], settings: Mapping[str, Any], output: Path) -> None:
    """Write the file ``source`` with other settings, and read it back.

    Args:
        source: YAML file of a run. Its first lines of comments are kept.
        overrides: Rest of the command line, which changed its settings.
        settings: Values by the dotted name of the setting.
        output: File to write.

    Raises:
        ConfigError: The written file would not be a good configuration.
        OSError: It cannot be written.
    """
    values = copy.deepcopy(apply_overrides(read_yaml(source).values, parse_overrides(overrides)[0])[0])
    for name, value in settings.items():
        _set(values, name.split("."), value, leave_out=_DEFAULTS.get(name) == value)
    if "activation_checkpointing" in values.get("training", {}):
        values["training"].pop("activation_memory_gib", None)
    text = yaml.safe_dump(values, sort_keys=False, width=120)
    output.write_text(_first_comments(source) + text, encoding="utf-8")
    load_config(output, [], schema_of(values), check_files=False)


def _set(values: Any, names: Sequence[str], value: Any, leave_out: bool) -> None:
    """Set a value in nested mappings and lists; one that would be left out is removed."""
    first, *rest = names
    key: Any = int(first) if isinstance(values, list) else first
    if rest:
        if isinstance(values, dict) and key not in values:
            if leave_out:
                return
            values[key] = {}
        _set(values[key], rest, value, leave_out)
        if values[key] == {}:
            del values[key]
    elif leave_out:
        values.pop(key, None)
    else:
        values[key] = value


def _first_comments(source: Path) -> str:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    number = next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[:number])
