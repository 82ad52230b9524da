"""``trainer.benchmark step`` on a run's own data and on made-up ones, and what it refuses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import make_assets, run_settings, write_settings
from trainer.benchmarks.step_parts import PARTS


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a source that keeps the images' aspect and a packed one."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    settings = run_settings(folder, folder / "run")
    pairs, documents, _ = settings["data"]["sources"]
    pairs |= {"image_tokens": 6}
    documents |= {"pack": True, "max_tokens": 40}
    return write_settings(folder / "run.yaml", settings)


def measured(world: Any, yaml: Path) -> dict[str, dict[str, float]]:
    from trainer.benchmarks import step
    from trainer.config.loader import load_config
    from trainer.config.schema import FlamingoRunConfig

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
