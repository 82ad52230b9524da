"""``trainer.benchmark step`` on a run's own data and on made-up ones, and what it refuses."""

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
from trainer.benchmark.step_parts import PARTS
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.runtime.distributed import World


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a source that keeps the images' aspect and a packed one."""
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
        found[data] = {row.measure: row.value for row in step._run(config, world, options)}
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_real_and_made_up_data(yaml: Path, processes: int) -> None:
    found = run_distributed(measured, processes, yaml)[0]
    real, made_up = found["real"], found["synthetic"]
    for values in (real, made_up):
        assert sum(values[f"part: {name}"] for name in PARTS) == values["profiled update, sum of the parts"]
        assert 0 < values["MFU"] <= values["HFU"]
        assert values["over the host link, a device"] == 0
        assert (values["of it to gather"] > 0) == (processes > 1) == (values["of it to reduce"] > 0)
    # 8 pairs and 4 texts, and 4 rows of several documents each, which are whole samples
    samples = real["samples per second, all"] * real["update, median"]
    assert samples > 16 + 1 and samples * 3 == pytest.approx(round(samples * 3))
    assert 0 < real["padding"] < 90
    assert "padding" not in made_up
    # 8 pairs of 24 tokens and an image; 4 documents of 40 and their 5 images; 4 texts of 24
    update = made_up["update, median"]
    assert made_up["samples per second, all"] * update == pytest.approx(16)
    assert made_up["tokens per second, all"] * update == pytest.approx(8 * 24 + 4 * 40 + 4 * 24)
    assert made_up["images per second, all"] * update == pytest.approx(8 + 4 * 5)


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
def test_what_cannot_be_measured(yaml: Path, arguments: list[str], message: str, capsys: Any) -> None:
    assert benchmark.main(["step", str(yaml), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_memory_of_a_gpu_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
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
    world = World(0, 1, 0, torch.device("cpu"))
    available = SimpleNamespace(available=8 * 2**30)
    monkeypatch.setattr(step_memory.psutil, "virtual_memory", lambda: available)
    with pytest.raises(ValueError, match=r"41\.\d GiB of the host, and 8\.0 GiB are free"):
        step_memory.check_memory(config, world)
    available.available = 64 * 2**30
    step_memory.check_memory(config, world)
