"""Break each rule across settings once, and find the setting to change in the message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import WriteYaml, problems_of, run_values
from trainer.config.batch_sizes import divide_batch, possible_world_sizes
from trainer.config.checks import missing_libraries
from trainer.config.checks.missing_libraries import optimizer_obstacle
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import check_world_size, load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig
from trainer.errors import ConfigError

CPU, NVME = {"device": "cpu"}, {"device": "nvme", "path": "drive"}


@pytest.mark.parametrize(
    ("section", "values", "path", "message"),
    [
        ("schedule", {"warmup_steps": 101}, "schedule.warmup_steps", "more than training.steps 100"),
        ("checkpoint", {"every": 10, "keep_every": 25}, "checkpoint.keep_every", "multiple of checkpoint.every 10"),
        ("resilience", {"skip_steps": [[9, 8]]}, "resilience.skip_steps.0", "from 9 to 8"),
        ("logging", {"profile_steps": [9, 8]}, "logging.profile_steps", "from 9 to 8"),
        ("resilience", {"watchdog": {"seconds": 200}}, "resilience.watchdog.seconds", "read_deadline_seconds 300"),
        ("resilience", {"watchdog": {"seconds": 2000}}, "resilience.watchdog.startup_seconds", "less than"),
        ("resilience", {"spikes": {"window": 9}}, "resilience.spikes.min_steps", "more than spikes.window 9"),
        ("optimizer", {"name": "cpu_adam"}, "optimizer.name", "needs deepspeed.offload_optimizer.device"),
        ("optimizer", {"betas": [0.9, 1.0]}, "optimizer.betas.1", "below 1"),
        ("deepspeed", {"zero_stage": 2, "offload_param": CPU}, "deepspeed.offload_param.device", "zero_stage 3"),
        (
            "deepspeed",
            {"zero_stage": 2, "hpz_partition_size": 8},
            "deepspeed.hpz_partition_size",
            "with zero_stage 3 only",
        ),
        (
            "deepspeed",
            {"zero_stage": 1, "offload_optimizer": NVME},
            "deepspeed.offload_optimizer.device",
            "zero_stage 3",
        ),
        (
            "deepspeed",
            {"offload_param": {"device": "nvme"}},
            "deepspeed.offload_param.path",
            "required with device: nvme",
        ),
        ("deepspeed", {"offload_param": {"path": "x"}}, "deepspeed.offload_param.path", "is for device: nvme"),
        ("deepspeed", {"frozen": "partitioned", "zero_stage": 2}, "deepspeed.frozen", "set it to replicated"),
        ("deepspeed", {"frozen": "replicated", "offload_param": CPU}, "deepspeed.frozen", "but that is cpu"),
        ("deepspeed", {"frozen": "partitioned", "offload_param": CPU}, "deepspeed.frozen", "but that is cpu"),
        ("deepspeed", {"frozen": "nvme", "offload_param": CPU}, "deepspeed.frozen", "device nvme, but that is cpu"),
        ("deepspeed", {"frozen": "nvme"}, "deepspeed.offload_param.path", "required with device: nvme"),
        ("deepspeed", {"frozen": "host", "zero_stage": 1}, "deepspeed.offload_param.device", "zero_stage 3"),
        ("deepspeed", {"frozen": "replicated", "hpz_partition_size": 8}, "deepspeed.frozen", "hpz_partition_size to 1"),
        ("model", {}, "model.language_model.name", "is required"),
        (
            "model",
            {"preset": "idefics-9b", "language_model": {"name": "a/b"}},
            "model.vision.architecture",
            "with random weights, which stay frozen: set model.start_from",
        ),
        (
            "model",
            {"language_model": {"name": "a/b"}, "vision": {"name": "transformers:a/b", "padding_tiles": True}},
            "model.vision.padding_tiles",
            "only resampler.kind linear",
        ),
        (
            "model",
            {"language_model": {"name": "a/b", "architecture": {"model_type": "llama"}}},
            "model.language_model.architecture",
            "name must be left out",
        ),
        (
            "model",
            {"language_model": {"architecture": {"model_type": "llama"}}},
            "model.language_model.tokenizer",
            "is required where",
        ),
        (
            "model",
            {"language_model": {"name": "a/b"}, "tokens": {"image": "<x>", "end_of_chunk": "<x>"}},
            "model.tokens.end_of_chunk",
            "must differ",
        ),
        (
            "model",
            {"language_model": {"name": "a/b"}, "cross_attention": {"every_n_layers": 2, "offset": 2}},
            "model.cross_attention.offset",
            "below cross_attention.every_n_layers 2",
        ),
        ("data", {"sources": []}, "data.sources", "at least one source"),
    ],
)
def test_one_broken_rule(write_yaml: WriteYaml, section: str, values: dict[str, Any], path: str, message: str) -> None:
    (problem,) = problems_of(write_yaml({**run_values(), section: values}))
    assert problem.path == path
    assert message in problem.message


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"name": "documents"}, "data.sources", "2 are named 'documents'"),
        ({"name": "a/b"}, "data.sources.0.name", "slash"),
        ({"micro_batch_size": 3}, "data.sources.0.micro_batch_size", "does not divide batch_size 16"),
        ({"micro_batch_tokens": 9, "max_tokens": 10}, "data.sources.0.micro_batch_tokens", "fewer than max_tokens 10"),
        (
            {"micro_batch_tokens": 999, "micro_batch_size": 4},
            "data.sources.0.micro_batch_tokens",
            "same as micro_batch_size 4",
        ),
    ],
)
def test_a_broken_rule_of_sources(write_yaml: WriteYaml, change: dict[str, Any], path: str, message: str) -> None:
    values = run_values()
    values["data"]["sources"][0].update(change)
    (problem,) = problems_of(write_yaml(values))
    assert problem.path == path
    assert message in problem.message


def test_image_tokens_need_a_tower_of_patches(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["data"]["sources"][0] |= {"type": "video_text", "num_frames": 9, "image_tokens": 100}
    values["model"] |= {"vision": {"name": "timm:dm_nfnet_f6"}}
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values))}
    assert set(found) == {"data.sources.0.image_tokens", "data.sources.0.num_frames"}
    assert (
        "squares only" in found["data.sources.0.image_tokens"]
        and "9 is more than" in found["data.sources.0.num_frames"]
    )
    del values["model"], values["data"]["sources"][1]
    values["data"]["sources"][0] |= {"type": "image_text"}
    del values["data"]["sources"][0]["num_frames"]
    (problem,) = problems_of(write_yaml(values), schema=ContrastiveRunConfig)
    assert problem.path == "data.sources.0.image_tokens"


def test_lanes_must_divide_every_batch(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["data"]["num_lanes"] = 16
    (problem,) = problems_of(write_yaml(values))
    assert problem.path == "data.sources.1.batch_size"
    assert "data.num_lanes 16" in problem.message


def test_apex_with_offload_is_an_error(write_yaml: WriteYaml) -> None:
    values = {**run_values(), "optimizer": {"name": "apex_fused_adam"}, "deepspeed": {"offload_optimizer": CPU}}
    (problem,) = problems_of(write_yaml(values))
    assert "cpu_adam or adamw" in problem.message


def test_each_trainer_takes_only_some_kinds_of_sources(write_yaml: WriteYaml) -> None:
    values = run_values()
    del values["model"]
    text = problems_of(write_yaml({**values, "architecture": {"model_type": "llama"}}), schema=LanguageModelRunConfig)
    assert [problem.path for problem in text] == ["data.sources.0.type", "data.sources.1.type"]
    pairs = problems_of(write_yaml(values), schema=ContrastiveRunConfig)
    assert [problem.path for problem in pairs] == ["data.sources.1.type"]
    unnamed = problems_of(write_yaml({**values, "architecture": {}}), schema=LanguageModelRunConfig)
    assert "architecture" in [problem.path for problem in unnamed]


def test_missing_files_are_found_before_anything_loads(
    write_yaml: WriteYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing_libraries, "nvme_obstacle", lambda: None)  # libaio, which not all machines have
    values = run_values()
    present = tmp_path / "pairs.npz"
    present.touch()
    (tmp_path / "file").touch()
    values["data"]["sources"][0]["manifest"] = str(present)
    values["run_dir"] = str(tmp_path / "file")
    values["model"] = {
        "language_model": {"name": "runs/not/there"},
        "vision": {"name": "local-dir:runs/tower", "pretrained": "weights.safetensors"},
    }
    values["deepspeed"] = {"offload_param": {"device": "nvme", "path": str(tmp_path / "nvme")}, "raw": "absent.json"}
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=True)}
    assert "python -m trainer.index --output documents.npz" in found.pop("data.sources.1.manifest")
    assert "is a file" in found.pop("run_dir")
    assert "no such file: absent.json" in found.pop("deepspeed.raw")
    assert set(found) == {
        "model.language_model.name",
        "model.vision.name",
        "model.vision.pretrained",
        "deepspeed.offload_param.path",
    }


def test_missing_libraries_are_found_before_anything_loads(
    write_yaml: WriteYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing_libraries.importlib.util, "find_spec", lambda name: None)
    values = run_values()
    for source in values["data"]["sources"]:
        source["manifest"] = str(tmp_path / "m.npz")
    (tmp_path / "m.npz").touch()
    values |= {"logging": {"wandb_project": "flamingo"}, "optimizer": {"name": "apex_fused_adam"}}
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=True)}
    assert set(found) == {"optimizer.name", "logging.wandb_project", "logging.tensorboard"}
    assert "pip install wandb" in found["logging.wandb_project"]


def test_another_package_named_apex_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = optimizer_obstacle("apex_fused_adam")
    assert message is not None
    assert "another project" in message
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").touch()
    assert optimizer_obstacle("apex_fused_adam") is not None  # NVIDIA's package, without its CUDA extension
    (tmp_path / "amp_C.py").touch()
    assert optimizer_obstacle("apex_fused_adam") is None


def test_cpu_adam_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    assert "a-compiler-that-is-not-there" in (optimizer_obstacle("cpu_adam") or "")
    assert optimizer_obstacle("adamw") is None


def test_world_sizes_divide_every_batch(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["data"]["sources"][0]["micro_batch_size"] = 4
    config = load_config(write_yaml(values), [], FlamingoRunConfig, check_files=False)
    assert possible_world_sizes(config) == [1, 2, 4]
    check_world_size(config, 2)
    with pytest.raises(ConfigError) as caught:
        check_world_size(config, 8)
    (problem,) = caught.value.problems
    assert problem.path == "data.sources.0.micro_batch_size"
    assert "4 does not divide" in problem.message
    assert "1, 2, 4" in problem.message
    with pytest.raises(ConfigError) as caught:
        check_world_size(config, 3)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(("tokens", "rows"), [(64, 1), (64 * 5, 4), (64 * 99, 8)])
def test_tokens_choose_the_rows_of_a_micro_batch(write_yaml: WriteYaml, tokens: int, rows: int) -> None:
    values = run_values()
    values["data"]["sources"][0] |= {"max_tokens": 64, "batch_size": 16, "micro_batch_tokens": tokens}
    config = load_config(write_yaml(values), [], FlamingoRunConfig, check_files=False)
    share = divide_batch(config.data, config.data.sources[0], world_size=2)
    assert (share.micro_batch_size, share.num_micro_batches) == (rows, 8 // rows)


def test_copies_of_the_parameters_need_whole_groups(write_yaml: WriteYaml) -> None:
    path = write_yaml({**run_values(), "deepspeed": {"hpz_partition_size": 4}})
    config = load_config(path, [], FlamingoRunConfig, check_files=False)
    assert possible_world_sizes(config) == [4, 8]
    check_world_size(config, 4)
    with pytest.raises(ConfigError, match="2 processes are not whole groups of 4"):
        check_world_size(config, 2)


def test_lanes_limit_the_world(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["data"]["num_lanes"] = 2
    config = load_config(write_yaml(values), [], FlamingoRunConfig, check_files=False)
    assert possible_world_sizes(config) == [1, 2]


def test_rules_of_an_evaluation(write_yaml: WriteYaml, tmp_path: Path) -> None:
    shards = {"name": "a", "type": "shards", "manifest": str(tmp_path / "m.npz"), "image": 2}
    questions = {"name": "a/b", "type": "vqa", "questions": "q.json", "images": "none", "support_questions": "s.json"}
    values = {"model": str(tmp_path / "export"), "output": "out", "tasks": [shards, shards, questions], "shots": []}
    values["deepspeed"] = {"offload_param": {"device": "cpu"}}
    found = [p.path for p in problems_of(write_yaml(values), schema=EvaluationConfig, check_files=True)]
    assert found == [
        *("tasks", "shots", "tasks.0.image", "tasks.0.manifest", "tasks.1.image", "tasks.1.manifest"),
        *("tasks.2.name", "tasks.2.support_annotations"),
        *(
            "tasks.2.questions",
            "tasks.2.images",
            "tasks.2.support_questions",
            "deepspeed.offload_param.device",
            "model",
        ),
    ]


def test_rules_of_an_evaluation_during_training(write_yaml: WriteYaml) -> None:
    values = run_values()
    task = {"name": "a", "type": "shards", "manifest": "m.npz", "shots": [4]}
    values["checkpoint"] = {"every": 50, "keep_best": 1, "best_metric": "eval/a/0"}
    (problem,) = problems_of(write_yaml(values), check_files=False)
    assert "without evaluation.tasks nothing else" in problem.message
    values["evaluation"] = {"every": 20, "tasks": [task], "demonstrations": "rices"}
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=False)}
    assert "there is loss, eval/a/4" in found["checkpoint.best_metric"]
    assert "is for trainer.evaluate" in found["evaluation.demonstrations"]
    values["checkpoint"]["best_metric"] = "eval/a/4"
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=False)}
    assert "no multiple of evaluation.every (20)" in found["checkpoint.every"]
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=True)}
    assert "no such file: m.npz" in found["evaluation.tasks.0.manifest"]


def test_a_raw_file_must_be_a_json_object(write_yaml: WriteYaml, tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    for text, message in (("[]", "must hold a JSON object"), ("{", "not a readable JSON file")):
        raw.write_text(text)
        (problem,) = problems_of(write_yaml({**run_values(), "deepspeed": {"raw": str(raw)}}))
        assert message in problem.message
    raw.write_text(json.dumps({"wall_clock_breakdown": True}))
    load_config(write_yaml({**run_values(), "deepspeed": {"raw": str(raw)}}), [], FlamingoRunConfig, check_files=False)


def test_rules_of_packing_filters_and_augmentation(write_yaml: WriteYaml) -> None:
    values = run_values()
    pairs, documents = values["data"]["sources"]
    pairs |= {"filters": {"min_words": 5, "max_words": 4}, "augment": {"crop_scale": [0.9, 0.5]}}
    documents |= {"type": "text", "packing": True, "samples_per_row": 2, "filters": {"min_side": 64}}
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=False)}
    assert "more than filters.max_words 4" in found["data.sources.0.filters.min_words"]
    assert "the smaller number first" in found["data.sources.0.augment.crop_scale"]
    assert "rows that are not packed" in found["data.sources.1.samples_per_row"]
    assert "only text" in found["data.sources.1.filters.min_side"]


def test_rules_of_trained_answers(write_yaml: WriteYaml) -> None:
    values = run_values()
    pairs = values["data"]["sources"][0]
    pairs |= {"train_on": "answer", "max_tokens": 3}
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=False)}
    assert "one token of the prompt; set at least 4" in found["data.sources.0.max_tokens"]
    pairs |= {"train_on": "all", "max_tokens": 32, "answer_prefix": "\n"}
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), check_files=False)}
    assert "set train_on: answer" in found["data.sources.0.answer_prefix"]
    values["data"]["sources"] = [{**pairs, "train_on": "answer"}]
    found = {problem.path: problem.message for problem in problems_of(write_yaml(values), schema=ContrastiveRunConfig)}
    assert "compares the image with the .txt alone" in found["data.sources.0.train_on"]


def test_overrides_of_a_video_source(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["data"]["sources"][0] |= {"type": "video_text", "num_frames": 4}
    words = ["--data.sources.pairs.filters.min_side", "64", "--data.sources.0.packing", "true"]
    config = load_config(write_yaml(values), words, FlamingoRunConfig, check_files=False)
    source = config.data.sources[0]
    assert (source.type, source.num_frames, source.filters.min_side, source.packing) == ("video_text", 4, 64, True)
