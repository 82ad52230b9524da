"""Test the generated DeepSpeed JSON, and which keys a raw JSON may set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import WriteYaml, problems_of, run_values
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.deepspeed_schema import KNOWN_KEYS, SECTION_KEYS
from trainer.config.loader import load_config
from trainer.config.raw_deepspeed_json import ALIASES, OWNERS
from trainer.config.run_config import FlamingoRunConfig

EXAMPLES = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))
# Settings that the YAML needs beside each example JSON, because they own keys of it.
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


def test_deepspeed_derives_its_batch_sizes(write_yaml: WriteYaml) -> None:
    """The engine marks the last micro-step itself, so the JSON does not depend on the number of micro-batches."""
    from deepspeed.runtime.config import DeepSpeedConfig

    values = deepspeed_json(configure(write_yaml))
    assert values["train_micro_batch_size_per_gpu"] == 1
    assert not {"train_batch_size", "gradient_accumulation_steps"} & set(values)
    read = DeepSpeedConfig(values)
    assert read.gradient_accumulation_steps == read.train_batch_size == 1


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
    values = deepspeed_json(config)
    assert values["gradient_clipping"] == 0.5
    assert values["bf16"] == {"enabled": False}
    zero = values["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["zero_hpz_partition_size"] == 2
    assert zero["reduce_bucket_size"] == 5
    assert zero["stage3_prefetch_bucket_size"] == 6
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "drive", "pin_memory": True}
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["stage3_gather_16bit_weights_on_model_save"] is False
    assert "data_types" not in values
    json.dumps(values)


@pytest.mark.parametrize(("frozen", "device", "more"), [("host", "cpu", {}), ("nvme", "nvme", {"path": "drive"})])
def test_frozen_weights_elsewhere_are_an_offload(
    write_yaml: WriteYaml, frozen: str, device: str, more: dict[str, Any]
) -> None:
    named = configure(write_yaml, deepspeed={"frozen": frozen, "offload_param": more})
    offloaded = configure(write_yaml, deepspeed={"offload_param": {"device": device, **more}})
    assert deepspeed_json(named) == deepspeed_json(offloaded)
    assert named.deepspeed.offload_param == offloaded.deepspeed.offload_param


def test_replicated_and_partitioned_change_no_key(write_yaml: WriteYaml) -> None:
    expected = deepspeed_json(configure(write_yaml))
    for frozen in ("replicated", "partitioned"):
        assert deepspeed_json(configure(write_yaml, deepspeed={"frozen": frozen})) == expected


@pytest.mark.parametrize(("name", "forced"), [("adamw", False), ("cpu_adam", None)])
def test_torchs_adamw_may_step_offloaded_state(write_yaml: WriteYaml, name: str, forced: bool | None) -> None:
    config = configure(write_yaml, optimizer={"name": name}, deepspeed={"offload_optimizer": {"device": "cpu"}})
    values = deepspeed_json(config)
    assert values.get("zero_force_ds_cpu_optimizer") is forced


def test_gradients_in_bfloat16_are_summed_in_float32(write_yaml: WriteYaml) -> None:
    for stage, expected in ((1, None), (2, {"grad_accum_dtype": "fp32"}), (3, {"grad_accum_dtype": "fp32"})):
        config = configure(write_yaml, deepspeed={"zero_stage": stage})
        assert deepspeed_json(config).get("data_types") == expected


def test_the_raw_json_is_merged(write_yaml: WriteYaml) -> None:
    raw = {
        "wall_clock_breakdown": True,
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 7, "stage3_max_live_parameters": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    config = configure(write_yaml, deepspeed={"raw": raw})
    values = deepspeed_json(config)
    assert values["wall_clock_breakdown"] is True
    assert values["gradient_clipping"] == 1.0
    assert values["zero_optimization"]["stage"] == 3
    assert values["zero_optimization"]["reduce_bucket_size"] == 7
    assert values["zero_optimization"]["stage3_prefetch_bucket_size"] == 50_000_000
    assert "stage3_max_live_parameters" not in values["zero_optimization"]
    assert "auto" not in json.dumps(values)
    assert not {"optimizer", "scheduler"} & set(values)


def test_all_contradictions_of_a_raw_json_are_reported_at_once(write_yaml: WriteYaml) -> None:
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


def test_raw_batch_sizes_are_refused_with_their_settings(write_yaml: WriteYaml) -> None:
    raw = {"train_batch_size": 64, "gradient_accumulation_steps": 9}
    found = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": raw}}))
    assert {problem.path: problem.related for problem in found} == {
        "deepspeed.raw.train_batch_size": ("data.sources.*.batch_size",),
        "deepspeed.raw.gradient_accumulation_steps": ("data.sources.*.micro_batch_size",),
    }


def test_examples_exist() -> None:
    assert {path.stem for path in EXAMPLES} >= {"zero3", *NEEDED}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_trainer_and_deepspeed_accept_the_examples(write_yaml: WriteYaml, example: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = {**NEEDED.get(example.stem, {}), "raw": str(example)}
    config = configure(write_yaml, deepspeed=settings)
    values = deepspeed_json(config)
    read = DeepSpeedConfig(values)  # refuses unknown keys below the top level
    assert read.zero_config.stage == 3
    assert read.gradient_accumulation_steps == 1
    assert read.gradient_clipping == 1.0


class Asked(dict[str, Any]):
    """Record which keys DeepSpeed asks for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def test_known_keys_are_those_that_deepspeed_reads() -> None:
    """A key that is missing would be refused although DeepSpeed reads it; any other one would be ignored silently."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    asked = Asked({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(asked)
    assert asked.names - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - {"vocabulary_size"} == KNOWN_KEYS
    assert {key.partition(".")[0] for key in (*OWNERS, *ALIASES)} <= KNOWN_KEYS
    for name, keys in SECTION_KEYS.items():
        section = Asked()
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, name: section})
        assert section.names == set(keys.split()), name


def test_aliases_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields.items()
    aliases = {f"zero_optimization.{name}": f"zero_optimization.{field.alias}" for name, field in fields if field.alias}
    assert aliases.items() <= ALIASES.items()
    deprecated = {name for name, field in fields if (field.json_schema_extra or {}).get("deprecated")}
    known = {key.partition(".")[2] for key in (*OWNERS, *ALIASES)}
    assert deprecated <= known


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ({"zero_optimization": {"reduce_bucketsize": 5}}, "zero_optimization.reduce_bucketsize", "reduce_bucket_size?"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size", "'big'"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size", "-1"),
        (
            {"zero_optimization": {"offload_param": {"buffer_cnt": 5}}},
            "zero_optimization.offload_param.buffer_cnt",
            "buffer_count?",
        ),
        ({"zero_optimization": True}, "zero_optimization", "must be a JSON object"),
        ({"comms_logger": {"enable": True}}, "comms_logger.enable", "enabled?"),
        ({"aio": {"blocksize": 1}}, "aio.blocksize", "block_size?"),
        ({"aio": 7}, "aio", "must be a JSON object"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "by itself"),
        ({"checkpoint": {"tag_valid": "Warn"}}, "checkpoint.tag_valid", "tag_validation?"),
        ({"data_types": {"grad_accum_type": "fp32"}}, "data_types.grad_accum_type", "grad_accum_dtype?"),
        ({"keep_in_fp32_modules": []}, "keep_in_fp32_modules", "no such key"),
    ],
)
def test_a_key_or_value_that_deepspeed_does_not_take(
    write_yaml: WriteYaml, raw: dict[str, Any], path: str, message: str
) -> None:
    (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": raw}}))
    assert problem.path == f"deepspeed.raw.{path}"
    assert message in problem.message


@pytest.mark.parametrize(
    "key",
    ["checkpoint.load_universal", "zero_optimization.round_robin_gradients", "zero_optimization.elastic_checkpoint"],
)
def test_keys_that_break_checkpoints_are_refused(write_yaml: WriteYaml, key: str) -> None:
    section, _, name = key.partition(".")
    (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": {section: {name: True}}}}))
    assert problem.path == f"deepspeed.raw.{key}"
    harmless = write_yaml({**run_values(), "deepspeed": {"raw": {section: {name: False}}}})
    load_config(harmless, [], FlamingoRunConfig, check_files=False)


@pytest.mark.parametrize(
    ("raw", "owner"),
    [
        ({"activation_checkpointing": {"partition_activations": True}}, "training.activation_checkpointing"),
        ({"train_batch_size": 16}, "data.sources.*.batch_size"),
        ({"train_micro_batch_size_per_gpu": 1}, "data.sources.*.micro_batch_size"),
        ({"zero_allow_untested_optimizer": True}, "optimizer.name"),
        ({"bfloat16": {"enabled": False}}, "training.dtype"),
        ({"zero_optimization": {"cpu_offload": True}}, "deepspeed.offload_optimizer.device"),
        ({"zero_optimization": {"cpu_offload_param": True}}, "deepspeed.offload_param.device"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "deepspeed.offload_param.device"),
        ({"optimizer": "Lion"}, "optimizer"),
        ({"scheduler": {"params": 5}}, "schedule"),
    ],
)
def test_owned_keys_name_their_setting(write_yaml: WriteYaml, raw: dict[str, Any], owner: str) -> None:
    found = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": raw}}))
    assert {problem.related for problem in found} == {(owner,)}


def test_a_null_section_does_not_turn_offload_off(write_yaml: WriteYaml) -> None:
    raw = {"zero_optimization": {"offload_param": None}}
    settings = {"raw": raw, "offload_param": {"device": "cpu"}}
    (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": settings}))
    assert problem.related == ("deepspeed.offload_param.device",)
    assert deepspeed_json(configure(write_yaml, deepspeed={"raw": raw}))["zero_optimization"]["stage"] == 3


def test_aliases_replace_the_generated_value(write_yaml: WriteYaml) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    zero = {"prefetch_bucket_size": 6, "stage3_gather_fp16_weights_on_model_save": True, "cpu_offload": False}
    raw = {"bfloat16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": zero}
    values = deepspeed_json(configure(write_yaml, deepspeed={"raw": raw}))
    assert values["bf16"] == {"enabled": True, "check_grad_overflow": False}
    read = DeepSpeedConfig(values).zero_config
    assert read.prefetch_bucket_size == 6
    assert read.gather_16bit_weights_on_model_save is True
    both = {"zero_optimization": {"prefetch_bucket_size": 6, "stage3_prefetch_bucket_size": 7}}
    (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": both}}))
    assert "another name" in problem.message


def test_a_json_file_with_a_repeated_key_is_refused(write_yaml: WriteYaml, tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text('{"zero_optimization": {"stage": 3, "stage": 2}}')
    (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": str(tmp_path / "raw.json")}}))
    assert "the key stage twice" in problem.message


@pytest.mark.parametrize("value", [True, "1.0", [1.0]])
def test_a_raw_value_of_another_type_is_refused(write_yaml: WriteYaml, value: Any) -> None:
    (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": {"gradient_clipping": value}}}))
    assert problem.path == "deepspeed.raw.gradient_clipping"
