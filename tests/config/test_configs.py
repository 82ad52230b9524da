"""Load every YAML in configs/, fit it to the cluster that it names, and load its resolved form again."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import WriteYaml
from trainer.config.batch_sizes import possible_world_sizes
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.loader import config_to_yaml, load_config, schema_of
from trainer.config.run_config import FlamingoRunConfig, RunConfig
from trainer.config.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL_RUNS = (
    "quickstart",
    "easy_vqa",
    "in_context",
    "benchmark",
    "own_data",
    "studies",
)  # folders of runs on any machine
pytestmark = pytest.mark.usefixtures("in_the_clone")


@pytest.fixture
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in configurations are relative to the current directory


def load(path: Path) -> Any:
    schema: type[Any] = schema_of(read_yaml(path).values)
    return load_config(path, [], schema, check_files=False)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def test_the_promised_configurations_exist() -> None:
    names = {name_of(path) for path in CONFIGS}
    assert names >= {"debug.yaml", "flamingo-3b.yaml", "flamingo-9b.yaml", "flamingo-80b.yaml", "openflamingo-3b.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_its_resolved_form_loads_to_the_same_settings(path: Path, write_yaml: WriteYaml) -> None:
    config = load(path)
    again = load(write_yaml(config_to_yaml(config)))
    assert again == config


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_it_fits_the_cluster_that_it_names(path: Path) -> None:
    config = load(path)
    cluster = re.search(r"# Cluster: (\d+) x (\d+) H100 \((\d+) processes\)", path.read_text())
    if cluster is None:
        assert path.name in ("debug.yaml", "tiny.yaml") or path.parent.name in SMALL_RUNS
        return
    nodes, gpus, processes = map(int, cluster.groups())
    assert nodes * gpus == processes
    assert isinstance(config, RunConfig)
    assert processes in possible_world_sizes(config)
    deepspeed_json(config)


@pytest.mark.parametrize("size", ["3b", "9b", "80b"])
def test_flamingo_runs_have_the_values_of_the_paper(size: str) -> None:
    from model.presets import get_preset

    config = load(ROOT / "configs" / f"flamingo-{size}.yaml")
    assert isinstance(config, FlamingoRunConfig)
    expected = get_preset(size)
    assert config.model.resampler == expected.resampler
    assert config.model.cross_attention == expected.cross_attention
    assert config.model.language_model.architecture is None
    assert [(source.weight, source.batch_size) for source in config.data.sources] == [(1.0, 256), (0.2, 512)]
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.clip_grad_norm) == (1e-4, 0.1, 1.0)
    assert (config.training.steps, config.schedule.warmup_steps, config.schedule.decay) == (500_000, 5000, "constant")
    assert config.training.loss_normalization == "token_sum"


def test_openflamingo_3b_has_the_values_of_the_preset() -> None:
    from model.presets import openflamingo

    config = load(ROOT / "configs" / "openflamingo-3b.yaml")
    expected = openflamingo(config.model.language_model, every_n_layers=1)
    assert asdict(config.model) == {**asdict(expected), "preset": None}


def test_open_clip_has_the_towers() -> None:
    import open_clip

    known = set(open_clip.list_pretrained())
    towers = [config.model.vision for config in map(load, CONFIGS) if isinstance(config, FlamingoRunConfig)]
    named = [(tower.name, tower.pretrained) for tower in towers if tower.pretrained is not None]
    assert len(named) >= 4
    assert set(named) <= known


def test_presets_can_be_overridden_on_the_command_line() -> None:
    path = ROOT / "configs" / "flamingo-3b.yaml"
    config = load_config(path, ["--model.preset", "9b"], FlamingoRunConfig, check_files=False)
    assert config.model.cross_attention.every_n_layers == 4
    assert config.model.language_model.name == "EleutherAI/pythia-1.4b"
    wrong = ["--model.preset", "7b"]
    with pytest.raises(ValueError, match="there is no preset '7b'; there are 3b, 80b, 9b, debug"):
        load_config(path, wrong, FlamingoRunConfig, check_files=False)
