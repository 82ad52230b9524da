"""Test ``trainer.benchmark step`` on real and on synthetic data, and the arguments that it refuses."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import make_assets, run_settings, write_settings
from tests.project.commands import ROOT
from trainer.benchmark import __main__ as benchmark
from trainer.benchmark import step_memory
from trainer.benchmark.part_clock import PARTS
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.planning.random_weights import build_on_meta_device
from trainer.runtime.distributed import World


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with a source that keeps the aspect of its images, and a packed one."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    settings = run_settings(folder, folder / "run")
    pairs, documents, _ = settings["data"]["sources"]
    pairs |= {"image_tokens": 6}
    documents |= {"packing": True, "max_tokens": 40}
    return write_settings(folder / "run.yaml", settings)


def measured(world: Any, yaml: Path) -> dict[str, dict[str, float]]:
    from trainer.benchmark import step

    config = load_config(yaml, [], FlamingoRunConfig)
    found = {}
    for data in ("real", "synthetic"):
        options = argparse.Namespace(data=data, steps=3, warmup=1, trace=None, peak_tflops=1.0)
        found[data] = {row.measure: row.value for row in step.measure_run(config, world, options)}
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_real_and_synthetic_data(yaml: Path, processes: int) -> None:
    found = run_distributed(measured, processes, yaml)[0]
    real, synthetic = found["real"], found["synthetic"]
    for values in (real, synthetic):
        assert sum(values[f"part: {name}"] for name in PARTS) == values["profiled step, sum of the parts"]
        assert 0 < values["MFU"] <= values["HFU"]
        assert values["over the host link"] == 0
        assert 0 < values["memory of a device between steps"] < values["peak memory of a device"]
        assert (
            (values["sent by a device to gather"] > 0) == (processes > 1) == (values["sent by a device to reduce"] > 0)
        )
    # A step has 8 pairs, 4 texts, and 4 rows of several whole documents.
    samples = real["samples per second"] * real["step, median"]
    assert samples > 16 + 1 and samples * 3 == pytest.approx(round(samples * 3))
    assert 0 < real["padding"] < 90
    assert "padding" not in synthetic
    # A step has 8 pairs of 24 tokens and an image, 4 documents of 40 tokens and 5 images, and 4 texts of 24 tokens.
    seconds = synthetic["step, median"]
    assert synthetic["samples per second"] * seconds == pytest.approx(16)
    assert synthetic["tokens per second"] * seconds == pytest.approx(8 * 24 + 4 * 40 + 4 * 24)
    assert synthetic["images per second"] * seconds == pytest.approx(8 + 4 * 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "--steps 3 or more"),
        (["--warmup", "0"], "--warmup 1 or more"),
        (["--peak-tflops", "0"], "peak is above 0"),
        (["--json", "nowhere/result.json"], "there is no folder"),
        (["--trace", "nowhere/trace.json"], "there is no folder"),
        (["--stepz", "4"], "no such setting"),
        (["--data.sources.0.micro_batch_size", "3"], "does not divide batch_size"),
    ],
)
def test_wrong_arguments_are_refused(yaml: Path, arguments: list[str], message: str, capsys: Any) -> None:
    assert benchmark.main(["step", str(yaml), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_gpu_memory_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    step_memory.limit_memory(None, World(0, 1, 0, torch.device("cpu")))
    with pytest.raises(ValueError, match="there is none here"):
        step_memory.limit_memory(24, World(0, 1, 0, torch.device("cpu")))
    gpu, limits = World(0, 1, 0, torch.device("cuda", 0)), []
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    step_memory.limit_memory(24, gpu)
    assert limits == [(0.3, gpu.device)]
    for gib in (0, 81):
        with pytest.raises(ValueError, match=r"the GPU has 80\.0 GiB"):
            step_memory.limit_memory(gib, gpu)


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs" / "flamingo-9b.yaml", [], FlamingoRunConfig, check_files=False)
    model, world = build_on_meta_device(config.model), World(0, 1, 0, torch.device("cpu"))
    available = SimpleNamespace(available=8 * 2**30)
    monkeypatch.setattr(step_memory.psutil, "virtual_memory", lambda: available)
    with pytest.raises(ValueError, match=r"41\.\d GiB of the host, and 8\.0 GiB are free"):
        step_memory.check_memory(config, model, world)
    available.available = 64 * 2**30
    step_memory.check_memory(config, model, world)


@pytest.mark.parametrize(("method", "gib"), [("int8", "35"), ("nf4", "32")])
def test_codes_count_with_their_bits_where_memory_is_checked(
    method: str, gib: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["--model.language_model.quantization", method]
    config = load_config(ROOT / "configs" / "flamingo-9b.yaml", overrides, FlamingoRunConfig, check_files=False)
    monkeypatch.setattr(step_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    model, world = build_on_meta_device(config.model), World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"{gib}\.\d GiB of the host"):
        step_memory.check_memory(config, model, world)
