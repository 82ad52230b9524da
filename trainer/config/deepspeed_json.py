"""The DeepSpeed json that a run needs, and what becomes of a raw one.

Everything DeepSpeed could also decide (batch sizes, clipping, precision, optimizer, schedule) has one owner elsewhere
in the configuration. A raw json may tune whatever has no owner; where it contradicts one, both places are named.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.run_config import OffloadConfig, RunConfig
from trainer.errors import ConfigError, Problem

AUTO = "auto"  # Hugging Face's jsons leave values to be filled in by writing this

# The top-level keys DeepSpeed 0.19 reads; it ignores all others without a word, so a misspelled one is refused here.
KNOWN_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 bf16_master_weights_and_grads checkpoint comet
    communication_data_type comms_logger compile csv_monitor data_efficiency data_types
    dataloader_drop_last ddp_bf16 disable_allgather disable_python_gc dump_state expert_parallel
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine keep_in_fp32_modules log_level managed_gradient_accumulation
    memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard
    timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    use_node_local_storage wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()
)

# Which setting owns a key of the json. "*" stands for everything below.
_OWNERS = {
    "train_batch_size": "data.sources.*.batch_size",
    "train_micro_batch_size_per_gpu": "data.sources.*.micro_batch_size",
    "gradient_accumulation_steps": "data.sources.*.micro_batch_size",
    "managed_gradient_accumulation": "data.sources.*.micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "bf16.enabled": "training.dtype",
    "bfloat16.enabled": "training.dtype",
    "fp16.enabled": "training.dtype",
    "torch_autocast.enabled": "training.dtype",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.zero_hpz_partition_size": "deepspeed.hpz_partition_size",
    "zero_optimization.offload_param.device": "deepspeed.offload_param.device",
    "zero_optimization.offload_param.nvme_path": "deepspeed.offload_param.path",
    "zero_optimization.offload_param.pin_memory": "deepspeed.offload_param.pin_memory",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.offload_optimizer.path",
    "zero_optimization.offload_optimizer.pin_memory": "deepspeed.offload_optimizer.pin_memory",
}
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Values of keys that the generated json leaves out.
_IMPLIED = {
    "fp16.enabled": False,
    "torch_autocast.enabled": False,
    "managed_gradient_accumulation": True,
    "zero_force_ds_cpu_optimizer": True,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.offload_param.device": "none",
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_param.nvme_path": None,
    "zero_optimization.offload_optimizer.nvme_path": None,
    "zero_optimization.offload_param.pin_memory": False,
    "zero_optimization.offload_optimizer.pin_memory": False,
}


def deepspeed_json(config: RunConfig, *, world_size: int, micro_batches_per_step: int) -> dict[str, Any]:
    """The mapping for ``deepspeed.initialize``, with the raw one merged over it.

    world_size: number of (data-parallel) processes.
    micro_batches_per_step: forward-backward passes of a rank before the optimizer steps, over all sources. Their
        sizes differ between sources and DeepSpeed never sees them, so a micro-batch counts as one to it.

    Raises: ConfigError with every key of the raw json that contradicts another section.
    """
    generated = _generate(config)
    generated["train_micro_batch_size_per_gpu"] = 1
    generated["gradient_accumulation_steps"] = micro_batches_per_step
    generated["train_batch_size"] = micro_batches_per_step * world_size
    raw, problems = _read_raw(config.deepspeed.raw, check_files=True)
    problems += _conflicts(raw, generated, config)
    if problems:
        raise ConfigError(problems, title="deepspeed.raw")
    return _merge(generated, {key: value for key, value in raw.items() if key not in ("optimizer", "scheduler")})


def raw_problems(config: RunConfig, *, check_files: bool = True) -> list[Problem]:
    """What is wrong with ``deepspeed.raw``, as far as it can be told before the number of processes is known."""
    raw, problems = _read_raw(config.deepspeed.raw, check_files=check_files)
    known = {key: value for key, value in raw.items() if key not in _BATCH_KEYS}
    return [*problems, *_conflicts(known, _generate(config), config)]


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
            # Gates, norms and biases stay whole on every rank: gathering them costs a message each and saves nothing.
            "stage3_param_persistence_threshold": 100_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    for name, offload in (("offload_param", settings.offload_param), ("offload_optimizer", settings.offload_optimizer)):
        if offload.device != "none":
            zero[name] = _offload(offload)
    bf16 = config.training.dtype == "bfloat16"
    result: dict[str, Any] = {
        "steps_per_print": 1_000_000_000,  # metrics.jsonl and the console line say it
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
    }
    if bf16 and stage >= 2:
        # The gradients of all sources are summed in fp32; stage 1 would switch to another optimizer wrapper for this.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if settings.offload_optimizer.device != "none" and config.optimizer.name != "cpu_adam":
        result["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW then steps on the host
    return result


def _offload(offload: OffloadConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"device": offload.device, "pin_memory": offload.pin_memory}
    if offload.path is not None:
        settings["nvme_path"] = str(offload.path)
    return settings


def _read_raw(raw: dict[str, Any] | Path | None, *, check_files: bool) -> tuple[dict[str, Any], list[Problem]]:
    def wrong(message: str) -> tuple[dict[str, Any], list[Problem]]:
        return {}, [Problem("deepspeed.raw", message)]

    if raw is None or isinstance(raw, dict):
        return raw or {}, []
    if not raw.is_file():
        return wrong(f"no such file: {raw}") if check_files else ({}, [])
    try:
        values = json.loads(raw.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        return wrong(f"{raw} is not a readable JSON file: {error}")
    return (values, []) if isinstance(values, dict) else wrong(f"{raw} must hold a JSON object")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _conflicts(raw: dict[str, Any], generated: dict[str, Any], config: RunConfig) -> list[Problem]:
    problems: list[Problem] = []
    for key in raw:
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(Problem(f"deepspeed.raw.{key}", f"DeepSpeed reads no such key{hint}"))
    ours = {**_IMPLIED, "bfloat16.enabled": generated["bf16"]["enabled"], **dict(_leaves(generated))}
    ours |= _optimizer_values(config)
    for key, value in _leaves(raw):
        section = key.partition(".")[0]
        owner = _OWNERS.get(key) or {"optimizer": "optimizer", "scheduler": "schedule"}.get(section)
        if owner is None or value == AUTO or (key in ours and _equal(ours[key], value)):
            continue
        if section == "scheduler" and _only_auto(raw[section]):
            continue
        said = f", which says {ours[key]!r}" if key in ours else ""
        message = f'{value!r} contradicts {owner}{said}; set it there and remove it here (or write "{AUTO}")'
        problems.append(Problem(f"deepspeed.raw.{key}", message, related=(owner,)))
    return problems


def _optimizer_values(config: RunConfig) -> dict[str, Any]:
    """What an ``optimizer`` section may repeat."""
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
    """Whether a scheduler section names a type and leaves every number to be filled in."""
    return isinstance(section, dict) and all(value == AUTO for value in section.get("params", {}).values())


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``; "auto" takes the base's value, or DeepSpeed's default where it has none."""
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
