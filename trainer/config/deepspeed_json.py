"""Generate DeepSpeed's JSON for a run, and merge the user's raw JSON into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.deepspeed_schema import key_problems
from trainer.config.raw_deepspeed_json import AUTO, conflicts, read_raw
from trainer.config.run_config import OffloadConfig, RunConfig
from trainer.errors import ConfigError, Problem

# Sections that the trainer's own settings replace, and old names of offload that DeepSpeed refuses beside the new ones.
_LEFT_OUT = ("optimizer", "scheduler", "activation_checkpointing", "zero_allow_untested_optimizer")
_OLD_OFFLOAD = ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")


def deepspeed_json(config: RunConfig) -> dict[str, Any]:
    """Return the JSON for ``deepspeed.initialize``, with the raw JSON merged into it.

    Raises:
        ConfigError: The raw JSON contradicts other sections or has keys that DeepSpeed does not read; the error names
            all such keys.
    """
    merged, problems = _merged(config, check_files=True)
    if problems:
        raise ConfigError(problems, title="deepspeed.raw")
    return merged


def raw_problems(config: RunConfig, *, check_files: bool = True) -> list[Problem]:
    """Return all problems of ``deepspeed.raw``.

    Args:
        config: Settings of the run.
        check_files: Whether it is a problem that the file does not exist.
    """
    return _merged(config, check_files=check_files)[1]


def _merged(config: RunConfig, *, check_files: bool) -> tuple[dict[str, Any], list[Problem]]:
    generated = _generate(config)
    raw, problems = read_raw(config.deepspeed.raw, check_files=check_files)
    problems += conflicts(raw, generated, config)
    over = {key: value for key, value in raw.items() if key not in _LEFT_OUT}
    zero = over.get("zero_optimization")
    if isinstance(zero, dict):
        over["zero_optimization"] = {key: value for key, value in zero.items() if key not in _OLD_OFFLOAD}
    merged = _merge(generated, over)
    reported = {problem.path for problem in problems}
    problems += [problem for problem in key_problems(raw, merged) if problem.path not in reported]
    return merged, problems


def _generate(config: RunConfig) -> dict[str, Any]:
    settings, stage = config.deepspeed, config.deepspeed.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "allgather_bucket_size": 200_000_000,
    }
    if stage == 3:
        zero |= {
            "overlap_comm": True,
            "stage3_prefetch_bucket_size": settings.prefetch_bucket_size,
            "zero_hpz_partition_size": settings.hpz_partition_size,
            # Gates, norms and biases stay whole on every rank: each gather costs a message and saves little memory.
            "stage3_param_persistence_threshold": 100_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    for name, offload in (("offload_param", settings.offload_param), ("offload_optimizer", settings.offload_optimizer)):
        if offload.device != "none":
            zero[name] = offload_section(offload)
    if settings.offload_param.device == "nvme":
        # Each parameter that stays gathered for its next use holds a buffer for the drive, and there are few of them.
        zero["stage3_max_reuse_distance"] = 0
    bf16 = config.training.dtype == "bfloat16"
    result: dict[str, Any] = {
        # Micro-batches of the sources differ in size, and DeepSpeed never sees their sizes. ``Engine`` marks the last
        # micro-step of each step, so DeepSpeed needs no number of micro-steps either.
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000_000,  # the trainer has its own console line
        # DeepSpeed clips at 1.0 where the key is missing.
        "gradient_clipping": 0.0 if config.optimizer.clip_grad_norm == "none" else config.optimizer.clip_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
    }
    if bf16 and stage >= 2:
        # Gradients of all sources are summed in float32. Stage 1 would use another optimizer wrapper with this key.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if settings.offload_optimizer.device != "none" and config.optimizer.name != "cpu_adam":
        result["zero_force_ds_cpu_optimizer"] = False  # lets torch's AdamW step on the host
    return result


def offload_section(offload: OffloadConfig) -> dict[str, Any]:
    """Return the section of an offload in DeepSpeed's JSON."""
    settings: dict[str, Any] = {"device": offload.device, "pin_memory": offload.pin_memory}
    if offload.path is not None:
        settings["nvme_path"] = str(offload.path)
    return settings


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``over`` into a copy of ``base``; "auto" keeps the base's value or else DeepSpeed's default."""
    result = dict(base)
    for key, value in over.items():
        if value == AUTO:
            continue
        below = base.get(key)
        if isinstance(value, dict):
            result[key] = _merge(below if isinstance(below, dict) else {}, value)
        else:
            result[key] = value
    return result
