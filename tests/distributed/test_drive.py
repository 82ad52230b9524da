"""Weights on a drive (``offload_param: nvme``): a run trains, is killed, resumes and exports."""

from __future__ import annotations

import ctypes.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.launched import finish, kill_rank_1, wait_for_step
from tests.distributed.small_run import losses, read_events, run_settings, write_settings
from tests.distributed.test_launcher import launch
from tests.model.builders import FAMILIES

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.long,  # DeepSpeed compiles its op for drives once, for 2 to 15 minutes
    pytest.mark.timeout(2400),
    pytest.mark.skipif(ctypes.util.find_library("aio") is None, reason="libaio is not installed"),
]

# Each half of a 1024 x 1024 matrix in bfloat16 is 1 MiB: the least that DeepSpeed keeps on a drive.
WIDE = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}


def write_wide_language_model(folder: Path, num_blocks: int) -> None:
    """Replace the weights of a language model by wider ones; the tokenizer stays."""
    torch.manual_seed(0)
    shape = {**FAMILIES["llama"], **WIDE, "vocab_size": 16, "num_hidden_layers": num_blocks}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).to(torch.bfloat16).save_pretrained(folder)


def drive_settings(assets: Path, run_dir: Path, **offload: Any) -> dict[str, Any]:
    """Return settings of a run in bfloat16 with few trained weights."""
    settings = run_settings(assets, run_dir, steps=6)
    settings["training"]["dtype"] = "bfloat16"
    settings["model"]["cross_attention"] |= {"every_n_layers": 8, "ff_mult": 1}
    settings["deepspeed"] = {"zero_stage": 3, "offload_param": offload, "timeout_seconds": 300}
    return settings


def test_a_run_with_weights_on_a_drive_equals_one_without_and_survives_a_kill(
    assets: Path, tmp_path: Path, port: int
) -> None:
    write_wide_language_model(assets / "lm", num_blocks=4)
    drives = {name: tmp_path / f"drive-{name}" for name in ("whole", "killed")}
    configs = {"host": write_settings(tmp_path / "host.yaml", drive_settings(assets, tmp_path / "host", device="cpu"))}
    for name, drive in drives.items():
        drive.mkdir()
        settings = drive_settings(assets, tmp_path / name, device="nvme", path=str(drive))
        configs[name] = write_settings(tmp_path / f"{name}.yaml", settings)
    for name in ("host", "whole"):
        code, output = finish(launch(configs[name], port), timeout_seconds=1500)
        assert code == 0, output
    assert losses(tmp_path / "whole") == losses(tmp_path / "host"), "where weights lie changes nothing"

    launched = launch(configs["killed"], port)
    wait_for_step(launched, tmp_path / "killed", 3)
    written = sum(path.stat().st_size for path in drives["killed"].rglob("*.swp"))
    kill_rank_1(launched)
    assert finish(launched)[0] != 0
    assert written >= 4 * (4 * 1024**2 + 3 * 1024 * 2048) * 2, "the frozen blocks are on the drive"
    code, output = finish(launch(configs["killed"], port))
    assert code == 0, output
    assert read_events(tmp_path / "killed", "resumed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), "bit for bit"
    exports = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("killed", "whole", "host")]
    assert exports[0] == exports[1] == exports[2]
