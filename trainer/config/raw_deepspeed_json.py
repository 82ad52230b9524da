"""Read the user's raw DeepSpeed JSON (``deepspeed.raw``), and find where it contradicts other settings.

Batch sizes, clipping, precision, optimizer and schedule are settings of other sections, which own these keys of the
JSON. The raw JSON may set every key that has no owner. Where it contradicts an owner, the problem names both places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.run_config import RunConfig
from trainer.errors import Problem

AUTO = "auto"  # in JSONs written for Hugging Face, a value to be filled in

# The setting that owns a key of the JSON, or all keys of a section.
OWNERS = {
    "train_batch_size": "data.sources.*.batch_size",
    "train_micro_batch_size_per_gpu": "data.sources.*.micro_batch_size",
    "gradient_accumulation_steps": "data.sources.*.micro_batch_size",
    "managed_gradient_accumulation": "data.sources.*.micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "activation_checkpointing": "training.activation_checkpointing",
    "bf16.enabled": "training.dtype",
    "fp16.enabled": "training.dtype",
    "torch_autocast.enabled": "training.dtype",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.zero_hpz_partition_size": "deepspeed.hpz_partition_size",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer.device",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_param.device",
    "zero_optimization.cpu_offload_use_pin_memory": "deepspeed.offload_param.pin_memory",
    "zero_optimization.offload_param.device": "deepspeed.offload_param.device",
    "zero_optimization.offload_param.nvme_path": "deepspeed.offload_param.path",
    "zero_optimization.offload_param.pin_memory": "deepspeed.offload_param.pin_memory",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.offload_optimizer.path",
    "zero_optimization.offload_optimizer.pin_memory": "deepspeed.offload_optimizer.pin_memory",
}
# Values of keys that the generated JSON leaves out.
_IMPLIED = {
    "fp16.enabled": False,
    "torch_autocast.enabled": False,
    "gradient_accumulation_steps": 1,
    "managed_gradient_accumulation": True,
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.cpu_offload": False,
    "zero_optimization.cpu_offload_param": False,
    "zero_optimization.cpu_offload_use_pin_memory": False,
    "zero_optimization.offload_param.device": "none",
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_param.nvme_path": None,
    "zero_optimization.offload_optimizer.nvme_path": None,
    "zero_optimization.offload_param.pin_memory": False,
    "zero_optimization.offload_optimizer.pin_memory": False,
}
# Keys that may only have the value given here, with the reason.
_REFUSED: dict[str, tuple[Any, str]] = {
    "checkpoint.load_universal": (
        False,
        "the trainer converts a checkpoint by itself where the number of processes changed; remove this",
    ),
    # Converting its shards gives tensors to the wrong parameters: the groups have another order than their names.
    "zero_optimization.round_robin_gradients": (
        False,
        "shards in this order cannot be converted for another number of processes or ZeRO stage; remove this",
    ),
    "zero_optimization.elastic_checkpoint": (
        False,
        "checkpoints fit any number of processes without it, and ZeRO-3 cannot save with it; remove this",
    ),
}
# Keys that DeepSpeed reads under two names, with the name that the generated JSON has.
_SHORT_NAMES = """prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
    max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold use_all_reduce_for_fetch_params
    allgather_sequential""".split()
ALIASES = {f"zero_optimization.{name}": f"zero_optimization.stage3_{name}" for name in _SHORT_NAMES} | {
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}


def read_raw(raw: dict[str, Any] | Path | None, *, check_files: bool) -> tuple[dict[str, Any], list[Problem]]:
    """Return the raw JSON, each key under one name, and its problems.

    Args:
        raw: ``deepspeed.raw``.
        check_files: Whether it is a problem that the file does not exist.
    """
    values, problems = (raw or {}, []) if isinstance(raw, dict | None) else _read_file(raw, check_files=check_files)
    renamed, twice = _with_one_name(values)
    return renamed, problems + twice


def _read_file(path: Path, *, check_files: bool) -> tuple[dict[str, Any], list[Problem]]:
    def wrong(message: str) -> tuple[dict[str, Any], list[Problem]]:
        return {}, [Problem("deepspeed.raw", message)]

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"it has the key {min(repeated)} twice")
        return dict(pairs)

    if not path.is_file():
        return wrong(f"no such file: {path}") if check_files else ({}, [])
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, OSError) as error:
        return wrong(f"{path} is not a readable JSON file: {error}")
    return (values, []) if isinstance(values, dict) else wrong(f"{path} must hold a JSON object")


def _with_one_name(raw: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the JSON with the aliases replaced, and a problem for each key that stands under both names."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    problems: list[Problem] = []
    for alias, name in ALIASES.items():
        section, _, key = alias.rpartition(".")
        values = result.get(section) if section else result
        if not isinstance(values, dict) or key not in values:
            continue
        target = name.rpartition(".")[2]
        if target in values:
            problems.append(Problem(f"deepspeed.raw.{alias}", f"is another name of {name}, which is also given"))
        values.setdefault(target, values[key])
        del values[key]
    return result, problems


def conflicts(raw: dict[str, Any], generated: dict[str, Any], config: RunConfig) -> list[Problem]:
    """Return a problem for each value of the raw JSON that contradicts the setting that owns it."""
    problems: list[Problem] = []
    ours = {**_IMPLIED, **dict(_leaves(generated)), **_optimizer_values(config)}
    # The generated value is DeepSpeed's bookkeeping and says nothing about the sources' micro-batches.
    del ours["train_micro_batch_size_per_gpu"]
    for name in ("offload_param", "offload_optimizer"):
        if name not in generated["zero_optimization"]:
            ours[f"zero_optimization.{name}"] = None
    for key, value in _leaves(raw):
        if value == AUTO or (key in ours and _equal(ours[key], value)):
            continue
        section = key.partition(".")[0]
        if section == "scheduler" and _only_auto(raw[section]):
            continue
        if key in _REFUSED:
            only, message = _REFUSED[key]
            if value != only:
                problems.append(Problem(f"deepspeed.raw.{key}", message))
        owner = _owner(key)
        if owner is None:
            continue
        said = f", which says {ours[key]!r}" if key in ours and "*" not in owner else ""
        message = f'{value!r} contradicts {owner}{said}; set it there and remove it here (or write "{AUTO}")'
        problems.append(Problem(f"deepspeed.raw.{key}", message, related=(owner,)))
    return problems


def _owner(key: str) -> str | None:
    """Return the setting that owns a key, its section, or all keys below it (a section that is null)."""
    below = [owner for owned, owner in OWNERS.items() if owned.startswith(f"{key}.") and key.count(".") > 0]
    return OWNERS.get(key) or OWNERS.get(key.partition(".")[0]) or next(iter(below), None)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _optimizer_values(config: RunConfig) -> dict[str, Any]:
    """Return the values that an ``optimizer`` section of the raw JSON may repeat."""
    optimizer = config.optimizer
    return {
        "optimizer.type": "AdamW",
        "optimizer.params.lr": optimizer.lr,
        "optimizer.params.betas": list(optimizer.betas),
        "optimizer.params.eps": optimizer.eps,
        "optimizer.params.weight_decay": optimizer.weight_decay,
    }


def _equal(left: Any, right: Any) -> bool:
    # True == 1 in Python, but "stage": true is not stage 1.
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def _only_auto(section: Any) -> bool:
    """Return whether every number of a scheduler section is to be filled in."""
    parameters = section.get("params", {}) if isinstance(section, dict) else None
    return isinstance(parameters, dict) and all(value == AUTO for value in parameters.values())
