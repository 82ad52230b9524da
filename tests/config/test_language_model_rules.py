"""Refuse a language model that cannot work, as far as its settings and files show it before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import WriteYaml, problems_of, run_values
from trainer.config.checks import missing_libraries
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig
from trainer.errors import Problem

LLAMA = {"model_type": "llama", "vocab_size": 10}


def tokenizer_files(folder: Path, *, vocab: Any = None, added: Any = (), settings: Any = None) -> Path:
    """Write a tokenizer's files with the ids 0 to 9."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {f"t{number}": number for number in range(10)} if vocab is None else vocab
    content = {"model": {"vocab": vocab}, "added_tokens": list(added)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return folder


def language_model(folder: Path, values: dict[str, Any]) -> Path:
    """Write the files of a local language model."""
    tokenizer_files(folder)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").touch()
    return folder


def find(write_yaml: WriteYaml, tmp_path: Path, language: dict[str, Any], **sections: Any) -> list[Problem]:
    """Return all problems of a run with this language model."""
    values = {**run_values(), "model": {"language_model": language}, **sections}
    for source in values["data"]["sources"]:
        source["manifest"] = str(tmp_path / "m.npz")
    (tmp_path / "m.npz").touch()
    path = write_yaml(values)
    try:
        load_config(path, [], FlamingoRunConfig)
    except ValueError:
        return problems_of(path, check_files=True)
    return []


@pytest.mark.parametrize(
    ("change", "max_tokens", "schema"),
    [
        ({}, 2, FlamingoRunConfig),
        ({"type": "interleaved"}, 2, FlamingoRunConfig),
        ({"type": "text"}, 1, LanguageModelRunConfig),
    ],
)
def test_rows_too_short_to_train_on(
    write_yaml: WriteYaml, change: dict[str, Any], max_tokens: int, schema: type
) -> None:
    values = run_values()
    values["data"]["sources"] = [{**values["data"]["sources"][0], **change, "max_tokens": max_tokens}]
    if schema is LanguageModelRunConfig:
        values["architecture"] = {"model_type": "llama"}
        del values["model"]
    (problem,) = problems_of(write_yaml(values), schema=schema)
    assert problem.path == "data.sources.0.max_tokens"
    assert f"{max_tokens} leaves nothing to train on" in problem.message
    load_config(write_yaml(values), [f"--data.sources.0.max_tokens={max_tokens + 1}"], schema, check_files=False)


def test_contrastive_captions_may_be_short(write_yaml: WriteYaml) -> None:
    values = run_values()
    del values["model"], values["data"]["sources"][1]
    load_config(write_yaml(values), ["--data.sources.0.max_tokens", "2"], ContrastiveRunConfig, check_files=False)


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [
        ({"model_type": "gpt2", "n_positions": 16}, 16),
        ({"model_type": "opt", "max_position_embeddings": 16}, 16),
        ({"model_type": "ctrl"}, 256),
    ],
)
def test_more_positions_than_the_language_model_has(
    write_yaml: WriteYaml, tmp_path: Path, architecture: dict[str, Any], positions: int
) -> None:
    language = {"architecture": architecture, "tokenizer": str(tokenizer_files(tmp_path / "t"))}
    data = run_values()["data"]
    data["sources"][1]["max_tokens"] = positions + 1
    data["sources"][0]["max_tokens"] = positions
    (problem,) = find(write_yaml, tmp_path, language, data=data)
    assert problem.path == "data.sources.1.max_tokens"
    assert problem.related == ("model.language_model.architecture",)
    folder = language_model(tmp_path / "lm", architecture)
    (problem,) = find(write_yaml, tmp_path, {"name": str(folder)}, data=data)
    assert problem.related == ("model.language_model.name",)
    rotary = {**language, "architecture": {"model_type": "llama", "max_position_embeddings": 16}}
    assert find(write_yaml, tmp_path, rotary, data=data) == []


def test_pretraining_has_positions_too(write_yaml: WriteYaml) -> None:
    values = run_values()
    del values["model"]
    values["architecture"] = {"model_type": "gpt2", "n_positions": 16}
    values["data"]["sources"] = [{**values["data"]["sources"][0], "type": "text", "max_tokens": 17}]
    (problem,) = problems_of(write_yaml(values), schema=LanguageModelRunConfig)
    assert (problem.path, problem.related) == ("data.sources.0.max_tokens", ("architecture",))


SPECIAL = {"content": "<s>", "id": 10, "special": True}


@pytest.mark.parametrize(
    ("files", "beyond"),
    [
        ({}, False),
        ({"vocab": {"a": 10}}, True),
        ({"vocab": [[f"t{number}", 0.0] for number in range(11)]}, True),
        ({"added": [{"content": "x", "id": 10, "special": False}]}, True),
        ({"added": [SPECIAL]}, False),  # no text becomes this token, and no row holds it
        ({"added": [SPECIAL], "settings": {"eos_token": "<s>"}}, True),
        ({"added": [SPECIAL], "settings": {"pad_token": {"content": "<s>"}}}, True),
        ({"added": [{**SPECIAL, "content": "<image>"}]}, False),  # has embeddings of its own
    ],
)
def test_tokens_beyond_the_table(write_yaml: WriteYaml, tmp_path: Path, files: dict[str, Any], beyond: bool) -> None:
    folder = tokenizer_files(tmp_path / "tokenizer", **files)
    found = find(write_yaml, tmp_path, {"architecture": LLAMA, "tokenizer": str(folder)})
    assert [problem.path for problem in found] == ["model.language_model.tokenizer"] * beyond
    if beyond:
        assert "1 tokens beyond the language model's table of 10" in found[0].message


def test_a_tokenizer_in_pure_python_is_refused(write_yaml: WriteYaml, tmp_path: Path) -> None:
    folder = tmp_path / "byt5"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    (problem,) = find(write_yaml, tmp_path, {"architecture": LLAMA, "tokenizer": str(folder)})
    assert problem.path == "model.language_model.tokenizer"
    assert "no tokenizer.json" in problem.message
    (folder / "vocab.json").touch()
    assert find(write_yaml, tmp_path, {"architecture": LLAMA, "tokenizer": str(folder)}) == []


def test_files_of_a_language_model_that_are_missing_or_damaged(write_yaml: WriteYaml, tmp_path: Path) -> None:
    folder = language_model(tmp_path / "lm", LLAMA)
    assert find(write_yaml, tmp_path, {"name": str(folder)}) == []
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (problem,) = find(write_yaml, tmp_path, {"name": str(folder)})
    assert "no *.safetensors" in problem.message and "save_pretrained" in problem.message
    (folder / "model.safetensors").touch()
    for text in ("{", "[]", None):
        (folder / "config.json").write_text(text) if text else (folder / "config.json").unlink()
        (problem,) = find(write_yaml, tmp_path, {"name": str(folder)})
        assert problem.path == "model.language_model.name"
        assert "config.json" in problem.message
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in find(write_yaml, tmp_path, {"name": str(folder)})[-1].message


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "compressed-tensors"])
def test_quantized_weights_need_their_package(
    write_yaml: WriteYaml, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**LLAMA, "quantization_config": {"quant_method": method}}
    folder = language_model(tmp_path / "lm", values)
    installed = missing_libraries.importlib.util.find_spec
    packages = ("bitsandbytes", "gptqmodel", "compressed_tensors")
    monkeypatch.setattr(
        missing_libraries.importlib.util, "find_spec", lambda name: None if name in packages else installed(name)
    )
    (problem,) = find(write_yaml, tmp_path, {"name": str(folder)})
    assert problem.path == "model.language_model.name"
    assert method in problem.message and "pip install" in problem.message
    monkeypatch.setattr(missing_libraries.importlib.util, "find_spec", lambda name: name)
    assert find(write_yaml, tmp_path, {"name": str(folder)}) == []


@pytest.mark.slow
def test_known_attentions_are_those_of_transformers() -> None:
    from transformers import AttentionInterface

    names = {name for name in AttentionInterface().valid_keys() if "|" not in name}
    assert names <= set(missing_libraries._ATTENTIONS)


@pytest.mark.parametrize(
    ("attention", "packages", "message"),
    [
        ("flash_attention_2", (), "flash-attn, which is not installed"),
        ("flash_attention_3", ("flash_attn",), "flash-attn-3"),
        ("kernels-community/flash-attn", (), "pip install kernels"),
        ("sdap", (), "did you mean sdpa?"),
        ("flash_attention_2", ("flash_attn",), "no float32"),
        ("sdpa", (), None),
        ("flex_attention", (), None),
        ("kernels-community/flash-attn", ("kernels",), None),
    ],
)
def test_attention_implementations(
    write_yaml: WriteYaml,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
    packages: tuple[str, ...],
    message: str | None,
) -> None:
    monkeypatch.setattr(
        missing_libraries.importlib.util, "find_spec", lambda name: name in (*packages, "tensorboard") or None
    )
    language = {"name": "owner/name", "attention": attention}
    found = find(write_yaml, tmp_path, language, training={"steps": 100, "dtype": "float32"})
    assert [problem.path for problem in found] == ["model.language_model.attention"] * (message is not None)
    assert message is None or message in found[0].message


def test_a_drive_needs_libaio(write_yaml: WriteYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing_libraries.ctypes.util, "find_library", lambda name: None)
    offload = {"device": "nvme", "path": str(tmp_path)}
    settings = {"offload_param": offload, "offload_optimizer": offload}
    found = find(write_yaml, tmp_path, {"name": "owner/name"}, deepspeed=settings)
    assert [problem.path for problem in found] == [
        "deepspeed.offload_param.device",
        "deepspeed.offload_optimizer.device",
    ]
    assert "libaio-dev" in found[0].message
    monkeypatch.setattr(missing_libraries.ctypes.util, "find_library", lambda name: "libaio.so.1")
    (tmp_path / "libaio.h").touch()
    monkeypatch.setenv("CPATH", str(tmp_path))
    assert find(write_yaml, tmp_path, {"name": "owner/name"}, deepspeed=settings) == []


def test_a_drive_and_a_gpu_need_a_cuda_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's builder of the op for drives runs nvcc where torch sees a GPU."""
    for name in ("bin/nvcc", "nvidia-smi", "c++", "ninja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "libaio.h").touch()
    monkeypatch.setattr(missing_libraries.ctypes.util, "find_library", lambda name: "libaio.so.1")
    monkeypatch.setenv("CPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "runtime-only"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert missing_libraries.nvme_obstacle() is None
    monkeypatch.delenv("DS_ACCELERATOR")
    assert "CUDA_HOME" in str(missing_libraries.nvme_obstacle())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert missing_libraries.nvme_obstacle() is None
