"""Test the search for the fastest settings, the file that it writes, and the shipped configurations against it."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.project.commands import ROOT
from trainer import plan
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.planning.devices import DEVICES
from trainer.planning.prediction import Cluster
from trainer.planning.predictor import Predictor
from trainer.planning.random_weights import build_on_meta_device
from trainer.planning.scaling import scaling
from trainer.planning.search import search, variants

DEBUG = ROOT / "configs" / "debug.yaml"


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(path: Path, *overrides: str) -> FlamingoRunConfig:
    return load_config(path, overrides, FlamingoRunConfig, check_files=False)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(build_on_meta_device(read(DEBUG).model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flamingo-3b", "flamingo-9b", pytest.param("flamingo-80b", marks=pytest.mark.long)])
def test_shipped_configurations_are_the_fastest_of_the_search(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    size = re.search(r"# Cluster: (\d+) x (\d+) H100", path.read_text())
    assert size is not None
    cluster, config = Cluster(DEVICES["h100"], int(size[1]), int(size[2])), read(path)
    predictor = Predictor(build_on_meta_device(config.model, config.training.dtype))
    blocks = len(predictor.model.language_model.decoder_blocks())
    best, *_ = search(config, blocks, cluster, partial(predictor, cluster=cluster), fastest_alone=True)
    assert best.prediction.fits
    own = predictor(config, cluster)
    assert own.fits and own.step_seconds <= 1.02 * best.prediction.step_seconds, best.variant.settings


@pytest.mark.slow
def test_no_more_blocks_are_recomputed_than_the_memory_asks_for(predictor: Predictor) -> None:
    config = read(DEBUG, "--data.sources.0.batch_size", "512")
    one = Cluster(DEVICES["h100"], 1, 1)

    def fastest(cluster: Cluster) -> tuple[int, FlamingoRunConfig]:
        # Of one micro-batch and one group, so that only recomputation can make it fit.
        found = search(config, 4, cluster, partial(predictor, cluster=cluster))
        chosen = next(one for one in found if one.variant.group == "stage 3")
        assert chosen.prediction.fits
        return chosen.prediction.recomputed, chosen.variant.config

    number, roomy = fastest(one)
    assert number == 0
    needed = predictor(roomy, one).device_memory
    tight = replace(one, device=replace(one.device, memory=needed - 1))
    number, found = fastest(tight)
    assert predictor(found, tight).fits
    if number:
        fewer = replace(found.training, activation_checkpointing=number - 1)
        assert not predictor(replace(found, training=fewer), tight).fits


def test_stages_are_alternatives_only_where_gradients_are_summed_alike() -> None:
    one = Cluster(DEVICES["h100"], 1, 1)
    for dtype, stage, expected in [
        ("float32", 3, {1, 2, 3}),
        ("bfloat16", 3, {2, 3}),
        ("bfloat16", 2, {2, 3}),
        ("bfloat16", 1, {1}),
    ]:
        config = read(DEBUG, "--training.dtype", dtype, "--deepspeed.zero_stage", str(stage))
        found = {variant.config.deepspeed.zero_stage for variant in variants(config, one)}
        assert found == expected, (dtype, stage)


def test_frozen_weights_are_replicated_under_stage_3_of_several_processes() -> None:
    config = read(DEBUG, "--deepspeed.frozen", "partitioned")
    for devices in (1, 2):
        found = list(variants(config, Cluster(DEVICES["h100"], 1, devices)))
        replicated = [variant for variant in found if variant.config.deepspeed.replicates_frozen]
        assert bool(replicated) == (devices == 2)
        for variant in replicated:
            assert variant.config.deepspeed.zero_stage == 3 and "frozen replicated" in variant.group
            assert variant.config.deepspeed.offload_param.device == "none"
            assert variant.settings["deepspeed.frozen"] == "replicated"
        others = [variant for variant in found if variant not in replicated]
        assert all(variant.settings["deepspeed.frozen"] is None for variant in others)


def test_variants_keep_what_is_trained(predictor: Predictor) -> None:
    config = read(DEBUG, "--data.sources.0.micro_batch_tokens", "999")
    for variant in variants(config, Cluster(DEVICES["h100"], 1, 2)):
        assert variant.settings["data.sources.0.micro_batch_tokens"] is None
        sources = [
            replace(source, micro_batch_size=before.micro_batch_size, micro_batch_tokens=before.micro_batch_tokens)
            for source, before in zip(variant.config.data.sources, config.data.sources, strict=True)
        ]
        data = replace(variant.config.data, sources=tuple(sources))
        assert replace(variant.config, data=data, deepspeed=config.deepspeed) == config


@pytest.mark.slow
def test_the_written_file_is_as_fast_as_the_search_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "found.yaml"
    arguments = ["--devices-per-node", "2", "--deepspeed.zero_stage", "3"]
    assert plan.main([str(DEBUG), *arguments, "--search", "--quantized", "--write", str(written)]) == 0
    printed = capsys.readouterr().out
    table = printed.partition("the fastest of each kind:\n")[2].partition("settings of the fastest")[0].splitlines()
    seconds = [float(line.split()[0]) for line in table]
    assert seconds and seconds == sorted(seconds)
    assert all("bound by" in line for line in table)
    assert re.findall(r"with model.language_model.quantization (\w+):\nthe fastest of each kind", printed) == [
        "int8",
        "nf4",
    ]
    expected = printed.partition(f"wrote {written}: ")[2].split()[0]
    assert plan.main([str(written), *arguments[:2]]) == 0
    total = re.search(r"step +total +([\d.]+) s", capsys.readouterr().out)
    assert total is not None and float(total[1]) == pytest.approx(float(expected), abs=0.006)
    config, original = read(written), read(DEBUG)
    assert config.optimizer == original.optimizer and config.model == original.model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/vision/debug.yaml"], "--quantized is for a frozen language model, and this run has none"),
        (
            [str(DEBUG), "--model.trainable.language_model", "full"],
            "int8 is for a language model that is frozen, not full",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([*arguments, "--devices-per-node", "1", "--search", "--quantized"]) == 2
    assert message in capsys.readouterr().err


def test_scaling_keeps_the_batch_or_grows_it(predictor: Predictor) -> None:
    config = read(DEBUG)
    points = list(scaling(config, Cluster(DEVICES["h100"], 1, 2), [1, 2, 16], predictor))
    batch = sum(source.batch_size for source in config.data.sources)
    assert [point.cluster.size for point in points] == [1, 2, 16]
    assert [point.strong and point.strong.samples for point in points] == [batch, batch, None]
    assert [point.weak and point.weak.samples for point in points] == [batch // 2, batch, 8 * batch]
    assert points[2].cluster.nodes == 8


def test_memory_beside_tensors_counts(predictor: Predictor) -> None:
    config, cluster = read(DEBUG), Cluster(DEVICES["h100"], 1, 1)
    found = predictor(config, cluster)
    assert found.device_memory == pytest.approx(1.04 * found.total_memory + 1.5 * 2**30)
    just_too_small = replace(cluster, device=replace(cluster.device, memory=found.device_memory - 1))
    assert found.fits and not predictor(config, just_too_small).fits


def test_host_memory_is_that_of_what_is_offloaded(predictor: Predictor) -> None:
    cluster = Cluster(DEVICES["h100"], 2, 2)
    offload = ["--deepspeed.offload_param.device", "cpu", "--deepspeed.offload_optimizer.device", "cpu"]
    batches = [f"--data.sources.{index}.batch_size=16" for index in (0, 1)]
    kept, offloaded = (predictor(read(DEBUG, *batches, *more), cluster) for more in ([], offload))
    assert not any(kept.host_memory.values())
    assert offloaded.host_memory["offloaded parameters"] == 4 * offloaded.parameters / 2
    assert offloaded.host_memory["offloaded optimizer"] == 16 * offloaded.trainable / 2
