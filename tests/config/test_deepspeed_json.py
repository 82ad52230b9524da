"""The generated DeepSpeed json, and what a raw one may and may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import WriteYaml, problems_of, run_values
from trainer.config import deepspeed_json as deepspeed_config
from trainer.config.deepspeed_json import KNOWN_KEYS, deepspeed_json
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))
# What the YAML has to say for each example; what has a setting stands in the YAML, the tuning in the json.
NEEDED: dict[str, dict[str, Any]] = {
    "zero3-hpz-8": {"hpz_partition_size": 8},
    "zero3-offload-cpu": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "zero3-offload-nvme": {
        "offload_param": {"device": "nvme", "path": "nvme"},
        "offload_optimizer": {"device": "nvme", "path": "nvme"},
    },
}


def configure(write_yaml: WriteYaml, **sections: Any) -> FlamingoRunConfig:
    return load_config(write_yaml({**run_values(), **sections}), [], FlamingoRunConfig, check_files=False)


def test_the_batch_identity_holds(write_yaml: WriteYaml) -> None:
    values = deepspeed_json(configure(write_yaml), world_size=6, micro_batches_per_step=5)
    assert values["gradient_accumulation_steps"] == 5
    per_update = values["train_micro_batch_size_per_gpu"] * values["gradient_accumulation_steps"] * 6
    assert values["train_batch_size"] == per_update


def test_every_section_reaches_the_json(write_yaml: WriteYaml) -> None:
    config = configure(
        write_yaml,
        training={"steps": 100, "dtype": "float32"},
        optimizer={"clip_grad_norm": 0.5},
        deepspeed={
            "hpz_partition_size": 2,
            "reduce_bucket_size": 5,
            "prefetch_bucket_size": 6,
            "offload_param": {"device": "nvme", "path": "drive", "pin_memory": True},
            "offload_optimizer": {"device": "cpu"},
        },
    )
    values = deepspeed_json(config, world_size=2, micro_batches_per_step=2)
    assert values["gradient_clipping"] == 0.5
    assert values["bf16"] == {"enabled": False}
    zero = values["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["zero_hpz_partition_size"] == 2
    assert zero["reduce_bucket_size"] == 5
    assert zero["stage3_prefetch_bucket_size"] == 6
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "drive", "pin_memory": True}
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["stage3_gather_16bit_weights_on_model_save"] is False
    assert "data_types" not in values
    json.dumps(values)


@pytest.mark.parametrize(("name", "forced"), [("adamw", False), ("cpu_adam", None)])
def test_torch_adamw_may_step_offloaded_state(write_yaml: WriteYaml, name: str, forced: bool | None) -> None:
    config = configure(write_yaml, optimizer={"name": name}, deepspeed={"offload_optimizer": {"device": "cpu"}})
    values = deepspeed_json(config, world_size=1, micro_batches_per_step=1)
    assert values.get("zero_force_ds_cpu_optimizer") is forced


def test_bf16_gradients_are_summed_in_fp32(write_yaml: WriteYaml) -> None:
    for stage, expected in ((1, None), (2, {"grad_accum_dtype": "fp32"}), (3, {"grad_accum_dtype": "fp32"})):
        config = configure(write_yaml, deepspeed={"zero_stage": stage})
        assert deepspeed_json(config, world_size=1, micro_batches_per_step=1).get("data_types") == expected


def test_raw_is_merged_over(write_yaml: WriteYaml) -> None:
    raw = {
        "wall_clock_breakdown": True,
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
        "train_batch_size": 12,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 7, "stage3_max_live_parameters": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    config = configure(write_yaml, deepspeed={"raw": raw})
    values = deepspeed_json(config, world_size=4, micro_batches_per_step=3)
    assert values["wall_clock_breakdown"] is True
    assert values["gradient_clipping"] == 1.0
    assert values["zero_optimization"]["stage"] == 3
    assert values["zero_optimization"]["reduce_bucket_size"] == 7
    assert values["zero_optimization"]["stage3_prefetch_bucket_size"] == 50_000_000
    assert "stage3_max_live_parameters" not in values["zero_optimization"]
    assert "auto" not in json.dumps(values)
    assert not {"optimizer", "scheduler"} & set(values)


def test_a_raw_json_that_contradicts_is_refused_with_all_its_contradictions(write_yaml: WriteYaml) -> None:
    raw = {
        "gradient_clipping": 2.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": {"lr": 1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}},
        "zero_optimisation": {"stage": 3},
    }
    found = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": raw}}))
    owners = {problem.path.removeprefix("deepspeed.raw."): problem.related for problem in found}
    assert owners == {
        "gradient_clipping": ("optimizer.clip_grad_norm",),
        "bf16.enabled": ("training.dtype",),
        "fp16.enabled": ("training.dtype",),
        "optimizer.type": ("optimizer",),
        "optimizer.params.lr": ("optimizer",),
        "scheduler.type": ("schedule",),
        "scheduler.params.warmup_num_steps": ("schedule",),
        "zero_optimization.stage": ("deepspeed.zero_stage",),
        "zero_optimization.offload_param.device": ("deepspeed.offload_param.device",),
        "zero_optimisation": (),
    }
    texts = {problem.path: problem.message for problem in found}
    assert "2.0 contradicts optimizer.clip_grad_norm, which says 1.0" in texts["deepspeed.raw.gradient_clipping"]
    assert "did you mean zero_optimization?" in texts["deepspeed.raw.zero_optimisation"]


def test_raw_batch_sizes_are_checked_once_the_world_is_known(write_yaml: WriteYaml) -> None:
    config = configure(write_yaml, deepspeed={"raw": {"train_batch_size": 64, "gradient_accumulation_steps": 9}})
    with pytest.raises(ConfigError) as caught:
        deepspeed_json(config, world_size=2, micro_batches_per_step=2)
    paths = {problem.path for problem in caught.value.problems}
    assert paths == {"deepspeed.raw.train_batch_size", "deepspeed.raw.gradient_accumulation_steps"}


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"zero3", *NEEDED}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted_by_us_and_by_deepspeed(write_yaml: WriteYaml, example: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = {**NEEDED.get(example.stem, {}), "raw": str(example)}
    config = configure(write_yaml, deepspeed=settings)
    values = deepspeed_json(config, world_size=1, micro_batches_per_step=2)
    read = DeepSpeedConfig(values)  # its pydantic models refuse unknown keys below the top level
    assert read.zero_config.stage == 3
    assert read.gradient_accumulation_steps == 2
    assert read.gradient_clipping == 1.0


def test_known_keys_are_those_that_deepspeed_reads() -> None:
    """A key of DeepSpeed's own constants that is missing here would be refused though it works."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    top_level = (
        "TRAIN_BATCH_SIZE GRADIENT_CLIPPING BFLOAT16 FP16 TORCH_AUTOCAST COMMUNICATION_DATA_TYPE PRESCALE_GRADIENTS "
        "GRADIENT_PREDIVIDE_FACTOR CHECKPOINT DATA_TYPES DUMP_STATE WALL_CLOCK_BREAKDOWN MEMORY_BREAKDOWN "
        "STEPS_PER_PRINT ZERO_ALLOW_UNTESTED_OPTIMIZER ZERO_FORCE_DS_CPU_OPTIMIZER LOG_LEVEL"
    )
    assert {getattr(constants, name) for name in top_level.split()} <= KNOWN_KEYS
    assert not set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) & KNOWN_KEYS
    assert {key.partition(".")[0] for key in deepspeed_config._OWNERS} <= KNOWN_KEYS


@pytest.mark.parametrize("value", [True, "1.0", [1.0]])
def test_a_raw_value_of_another_type_is_not_the_same_value(write_yaml: WriteYaml, value: Any) -> None:
    (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": {"gradient_clipping": value}}}))
    assert problem.path == "deepspeed.raw.gradient_clipping"
