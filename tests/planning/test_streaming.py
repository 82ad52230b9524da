"""Test what streaming needs: bytes on a drive, buffers, the smallest micro-batch, and refusals before loading."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.project.commands import ROOT
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.errors import ConfigError
from trainer.planning.devices import DEVICES
from trainer.planning.prediction import Cluster
from trainer.planning.storage import drive_need, size_buffers
from trainer.planning.streaming import print_streaming, smallest_hidden_micro_batches
from trainer.resilience.run_lock import RunLockedError
from trainer.resilience.swap_folders import DriveError, swap_folders
from trainer.runtime.distributed import World
from trainer.tasks import storage_check

NVME = {"offload_param": {"device": "nvme"}}


def config_with(*arguments: str) -> FlamingoRunConfig:
    return load_config(ROOT / "configs" / "debug.yaml", arguments, FlamingoRunConfig, check_files=False)


def on_drive(folder: Path) -> FlamingoRunConfig:
    settings = ("--deepspeed.offload_param.device", "nvme", "--deepspeed.offload_param.path", str(folder))
    return config_with(*settings)


def wide_block() -> nn.Module:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 1024))
    return block.requires_grad_(False)


def test_matrices_lie_on_the_drive_and_vectors_on_the_host() -> None:
    block = wide_block()
    need = drive_need(block.parameters(), [block], NVME, ranks=2, itemsize=2)
    assert (need.parameters, need.optimizer, need.largest) == (2 * 2 * 2**20, 0.0, 2**20)
    assert need.buffers == 5 * 2 * 2**20
    assert not drive_need(block.parameters(), [block], NVME, ranks=8, itemsize=2).largest, "each is below 1 MiB"
    zero: dict[str, Any] = {"offload_param": {"device": "nvme", "buffer_count": 9}}
    size_buffers(zero, drive_need(block.parameters(), [block], zero, ranks=2, itemsize=2))
    assert zero["offload_param"] == {"device": "nvme", "buffer_count": 9, "buffer_size": 2**20}


def seconds(config: Any, cluster: Any) -> Any:
    """Predict 0.5 s on the link for the parameters of each micro-batch, 0.1 s for the optimizer, 0.02 s a row."""
    [source] = config.data.sources
    count = source.batch_size // (source.micro_batch_size or source.batch_size)
    link = 0.5 * count if config.deepspeed.offload_param.device != "none" else 0.0
    return SimpleNamespace(seconds={"host link": link + 0.1, "compute": 0.02 * source.batch_size})


def test_the_smallest_micro_batch_that_hides_the_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(DEVICES["h100"], 1, 1)
    assert not list(smallest_hidden_micro_batches(config_with(), cluster, seconds))
    config = config_with("--deepspeed.offload_param.device", "cpu")
    source = replace(config.data.sources[0], batch_size=64, micro_batch_size=16)
    config = replace(config, data=replace(config.data, sources=(source,), num_lanes=None))
    [found] = smallest_hidden_micro_batches(config, cluster, seconds)
    assert (found.rows, found.tokens, found.fits) == (25, 25 * source.max_tokens, True)
    assert found.stream_seconds == pytest.approx(0.5)
    print_streaming(found)
    assert "hidden by 25 rows or more" in (printed := capsys.readouterr().out)
    assert "micro-batch of 16 rows does NOT hide it" in printed

    def with_codes(config: Any, cluster: Any) -> Any:
        """Predict 0.2 s more of computation for each of the four micro-batches, whatever their rows."""
        return SimpleNamespace(seconds=seconds(config, cluster).seconds | {"dequantize": 4 * 0.2})

    [found] = smallest_hidden_micro_batches(config, cluster, with_codes)
    assert found.rows == 15

    def from_drives(config: Any, cluster: Any) -> Any:
        """Predict 0.8 s on the drives for each of the four micro-batches, beside the 0.5 s on the link."""
        return SimpleNamespace(seconds=seconds(config, cluster).seconds | {"drive": 4 * 0.8})

    [found] = smallest_hidden_micro_batches(config, cluster, from_drives)
    assert (found.rows, found.stream_seconds) == (40, pytest.approx(0.8))


def prepare(monkeypatch: pytest.MonkeyPatch, config: FlamingoRunConfig, **raw: int) -> None:
    """Prepare a run of one process whose model is one wide block."""
    block = wide_block()
    model: Any = SimpleNamespace(parameters=block.parameters, blocks=lambda: [block])
    monkeypatch.setattr(storage_check, "build_on_meta_device", lambda *_: model)
    monkeypatch.setattr(storage_check, "_host_problems", lambda *_: iter(()))
    monkeypatch.setattr(storage_check, "failing_together", lambda world: pytest.MonkeyPatch.context())
    offload = {"device": config.deepspeed.offload_param.device, **raw}
    world = World(0, 1, 0, torch.device("cpu"))
    storage_check.prepare_offload(config, {"zero_optimization": {"offload_param": offload}}, world)


def test_a_full_folder_and_buffers_that_are_too_small_are_refused_with_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = on_drive(tmp_path)
    prepare(monkeypatch, config)
    with pytest.raises(ConfigError, match="buffer_size: 1000 elements are fewer than the 2097152"):
        prepare(monkeypatch, config, buffer_size=1000)
    monkeypatch.setattr(storage_check, "_lockable_bytes", lambda: 2.0**20)
    with pytest.raises(ConfigError, match=r"5 buffers of a process lock 0\.04 GiB .* limit is 0\.001 GiB"):
        prepare(monkeypatch, config)
    monkeypatch.setattr(storage_check, "_lockable_bytes", lambda: 2.0**40)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**20))
    with pytest.raises(ConfigError, match=r"path: .* has 0\.00 GiB free, and this node needs 0\.02 GiB there"):
        prepare(monkeypatch, config)


def test_more_than_the_hosts_memory_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with("--deepspeed.offload_param.device", "cpu", "--model.preset", "debug")
    monkeypatch.setattr(storage_check, "host_memory_limit", lambda: 1e5)
    monkeypatch.setattr(storage_check, "failing_together", lambda world: pytest.MonkeyPatch.context())
    settings = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=r"take 0\.00 GiB of a node that has 0\.00 GiB; take more nodes"):
        storage_check.prepare_offload(config, settings, World(0, 1, 0, torch.device("cpu")))


def test_replicas_larger_than_a_device_are_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with("--deepspeed.frozen", "replicated", "--model.preset", "debug")
    monkeypatch.setattr(storage_check, "failing_together", lambda world: pytest.MonkeyPatch.context())
    monkeypatch.setattr(storage_check, "host_memory_limit", lambda: 2.0**40)
    settings: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    storage_check.prepare_offload(config, settings, World(0, 1, 0, torch.device("cpu")))
    monkeypatch.setattr(storage_check, "host_memory_limit", lambda: 1e5)
    with pytest.raises(ConfigError, match=r"frozen: replicated: the frozen weights take 0\.00 GiB of each device"):
        storage_check.prepare_offload(config, settings, World(0, 1, 0, torch.device("cpu")))


def test_the_memory_of_a_cgroup_is_a_limit() -> None:
    import psutil

    assert 0 < storage_check.host_memory_limit() <= psutil.virtual_memory().total


def test_a_second_run_in_a_swap_folder_is_refused_and_the_first_leaves_no_weights(tmp_path: Path) -> None:
    settings = on_drive(tmp_path).deepspeed
    with swap_folders(settings, rank=0):
        swapped = tmp_path / "zero_stage_3" / "bfloat16params" / "rank0" / "1_param.tensor.swp"
        swapped.parent.mkdir(parents=True)
        swapped.write_bytes(b"weights")
        with swap_folders(settings, rank=1):
            pass
        with pytest.raises(RunLockedError, match="choose another deepspeed.offload"), swap_folders(settings, rank=0):
            pass
        assert swapped.is_file()
    assert not swapped.exists()


def test_a_file_system_without_direct_io_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: object, flags: int, mode: int = 0o777) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("trainer.resilience.swap_folders.os.open", refuse)
    with pytest.raises(DriveError, match="has no direct I/O"), swap_folders(on_drive(tmp_path).deepspeed, rank=0):
        pass
