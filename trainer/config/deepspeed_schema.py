"""Name the keys that DeepSpeed 0.19 reads from its JSON.

DeepSpeed ignores an unknown key at the top level and in some sections, and raises in others only after all processes
have joined. So the trainer compares the keys before the start. Sections that have a pydantic model in DeepSpeed are
validated by it; importing the models takes seconds, so it happens only where such a section is given.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from trainer.errors import Problem

KNOWN_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet communication_data_type comms_logger
    compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print
    tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()
)
# Keys of the sections from which DeepSpeed picks values one by one, and so ignores all others.
SECTION_KEYS = {
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write writer checkpoint_serialization",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    "timers": "throughput",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
}
_SECTIONS_WITH_MODELS = frozenset(
    "bf16 comet comms_logger compile csv_monitor fp16 hybrid_engine tensorboard wandb zero_optimization".split()
)


def key_problems(raw: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each key and value that DeepSpeed would ignore or refuse.

    Args:
        raw: The user's JSON.
        merged: The JSON that DeepSpeed would get, with ``raw`` merged into it.
    """
    for key, value in raw.items():
        path = f"deepspeed.raw.{key}"
        if key not in KNOWN_KEYS:
            yield Problem(path, f"DeepSpeed reads no such key{_suggestion(key, KNOWN_KEYS)}")
        elif (key in SECTION_KEYS or key in _SECTIONS_WITH_MODELS) and not isinstance(value, dict):
            yield Problem(path, f"must be a JSON object, not {value!r}")
        elif key in SECTION_KEYS:
            known = SECTION_KEYS[key].split()
            for name in value.keys() - set(known):
                yield Problem(f"{path}.{name}", f"DeepSpeed reads no such key{_suggestion(name, known)}")
        elif key in _SECTIONS_WITH_MODELS and value:
            yield from _model_problems(path, _models()[key], merged[key])


def _models() -> dict[str, Any]:
    """Return DeepSpeed's pydantic model of each section.

    Reason: DeepSpeed has no public function that checks a JSON without a process group.
    Upstream issue: none found.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "bf16": DeepSpeedBF16Config,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "csv_monitor": CSVConfig,
        "fp16": DeepSpeedFP16Config,
        "hybrid_engine": HybridEngineConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }


def _model_problems(path: str, model: Any, values: Any) -> Iterator[Problem]:
    from pydantic import ValidationError

    try:
        model.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            location = [str(part) for part in item["loc"]]
            if item["type"] == "extra_forbidden":
                message = f"DeepSpeed reads no such key{_suggestion(location[-1], _names(model, location[:-1]))}"
            else:
                message = f"DeepSpeed refuses {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
            yield Problem(".".join([path, *location]), message)


def _names(model: Any, location: list[str]) -> list[str]:
    """Return the keys of the model at a location inside another model."""
    for name in location:
        fields = {field.alias or key: field for key, field in model.model_fields.items()}
        hint = fields[name].annotation
        model = next(one for one in (hint, *get_args(hint)) if hasattr(one, "model_fields"))
    return [field.alias or key for key, field in model.model_fields.items()]


def _suggestion(name: str, known: frozenset[str] | list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
