"""Test the rules of what trains, and of the settings of parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.project.commands import ROOT
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig
from trainer.errors import ConfigError

DEBUG = ROOT / "configs" / "debug.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimizer.parts.vision.lr_multiplier=2"], "model.trainable.vision is frozen"),
        (["--optimizer.parts.tower.lr_multiplier=2"], "optimizer.parts.tower"),
        (["--model.trainable.resampler=lora"], "model.trainable.resampler"),
        (["--model.language_model_lora.rank=4"], "is for model.trainable.language_model: lora, not frozen"),
        (["--model.trainable.vision=lora", "--model.vision_lora.rank=0"], "vision_lora.rank: must be 1 or more, not 0"),
        (["--model.trainable.vision=lora", "--model.vision_lora.dropout=1"], "below 1, not 1"),
        (
            ["--model.language_model.quantization=int8", "--model.trainable.language_model=full"],
            "model.language_model.quantization: int8 is for a language model that is frozen, not full",
        ),
        (
            ["--model.language_model.quantization=int8", "--deepspeed.offload_param.device=nvme"],
            "int8 cannot lie on a drive",
        ),
        (["--schedule.decay=exponential"], "schedule.final_lr_ratio: an exponential never reaches 0"),
    ],
)
def test_rules_of_what_trains(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEBUG, overrides, FlamingoRunConfig, check_files=False)
    assert message in str(caught.value)


def test_quantized_weights_train_only_with_adapters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    named = [f"--model.language_model.name={tmp_path}", "--model.language_model.architecture=null"]

    def load(mode: str) -> None:
        trainable = f"--model.trainable.language_model={mode}"
        load_config(DEBUG, [*named, trainable], FlamingoRunConfig, check_files=False)

    load("lora")
    with pytest.raises(ConfigError, match=r"quantized \(gptq\) and cannot train"):
        load("full")
    named.append("--model.language_model.quantization=int8")
    with pytest.raises(ConfigError, match=r"quantized already \(gptq\)"):
        load("frozen")


def test_only_a_flamingo_has_parts() -> None:
    vision = ROOT / "configs" / "quickstart" / "vision.yaml"
    with pytest.raises(ConfigError, match=r"only trainer\.train has these parts"):
        load_config(vision, ["--optimizer.parts.vision.lr_multiplier=2"], ContrastiveRunConfig, check_files=False)
