"""Weights on a drive (``offload_param: nvme``): a run trains, is killed, resumes and exports, also in little memory."""

from __future__ import annotations

import ctypes.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.launched import finish, kill_rank_1, start, wait_for_step, wait_until
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
    settings["training"] |= {"dtype": "bfloat16", "activation_checkpointing": True}
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
    # From a drive, the parameters of a block are gathered together, and a CPU rounds their products in another way.
    for name, module in (("host", "tests.distributed.train_whole_blocks"), ("whole", "trainer.train")):
        code, output = finish(launch(configs[name], port, module=module), timeout_seconds=1500)
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


LIMIT = 3 * 2**29  # bytes of memory: libraries alone take half of it


def write_equal_blocks(folder: Path, num_blocks: int) -> int:
    """Replace the weights of a language model by many blocks with the same weights; return their bytes."""
    shape = {**FAMILIES["llama"], **WIDE, "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 16}
    config = AutoConfig.for_model(**shape | {"num_hidden_layers": num_blocks, "dtype": "bfloat16"})
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        block, _, within = name.removeprefix("model.layers.").partition(".")
        if within not in made:
            made[within] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(tensor.dim() == 1, 0.02)
        files.setdefault(f"model-{block if block.isdigit() else 'rest'}.safetensors", {})[name] = made[within]
    size = 0
    for file, tensors in files.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        size += (folder / file).stat().st_size
    places = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """Make a group of processes that have ``LIMIT`` bytes of memory together; return the file that adds one to it."""
    for root, limit, add in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "tasks"),
        ("/sys/fs/cgroup", "memory.max", "cgroup.procs"),
    ):
        group = Path(root, f"test-drive-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text(str(LIMIT))
        except OSError:
            continue
        yield group / add
        group.rmdir()
        return
    pytest.skip("this machine lets nobody limit the memory of a group of processes")


def test_a_language_model_four_times_as_large_as_the_memory_trains_resumes_and_exports(
    assets: Path, tmp_path: Path, limited_group: Path
) -> None:
    assert write_equal_blocks(assets / "lm", num_blocks=64) > 4 * LIMIT
    drive, run_dir = tmp_path / "drive", tmp_path / "run"
    drive.mkdir()
    settings = drive_settings(assets, run_dir, device="nvme", path=str(drive))
    settings["model"]["cross_attention"]["every_n_layers"] = 64
    settings["data"]["sources"] = settings["data"]["sources"][:1]
    settings["training"]["steps"] = 3
    settings["checkpoint"] = {"every": 1, "keep_last": 2}
    config = write_settings(tmp_path / "run.yaml", settings)
    command = ["bash", "-c", f'echo $$ > {limited_group} && exec "$@"', "limited"]
    command += [sys.executable, "-m", "trainer.train", str(config)]
    killed = start(command)
    wait_until(killed, (run_dir / "checkpoints" / "latest").is_file, timeout_seconds=900)
    killed.kill()
    assert finish(killed)[0] == -9
    code, output = finish(start(command), timeout_seconds=1500)
    assert code == 0, output
    assert read_events(run_dir, "resumed") and len(losses(run_dir)) == 3
    assert (run_dir / "export" / "model.safetensors").is_file()
