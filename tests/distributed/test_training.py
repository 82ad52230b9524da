"""The whole trainer on several processes keeps invariants 3, 4, 6 and 7 of the design."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.helpers import build_manifest, image_bytes, write_shard
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_ledger, read_metrics, run_settings
from tests.distributed.train_in_process import as_config, train_error, train_run
from trainer.checkpoint.catalog import find_checkpoint
from trainer.deepspeed_engine.engine import Engine
from trainer.observers.step_observer import StepObserver
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def uninterrupted(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that two processes trained without a break."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_distributed(train_run, 2, run_settings(assets, run_dir))
    return run_dir


def test_one_process_and_two_give_the_same_losses_and_samples(
    assets: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_distributed(train_run, 1, run_settings(assets, tmp_path / "one"))
    assert losses(tmp_path / "one") == pytest.approx(losses(uninterrupted), rel=1e-5)
    assert read_ledger(tmp_path / "one") == read_ledger(uninterrupted)
    norms = [[line["grad_norm"] for line in read_metrics(run)] for run in (tmp_path / "one", uninterrupted)]
    flops = [
        [line["tflops"] * line["step_seconds"] * processes for line in read_metrics(run)]
        for processes, run in ((1, tmp_path / "one"), (2, uninterrupted))
    ]
    assert flops[0] == pytest.approx(flops[1], rel=5e-3) and min(flops[0]) > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_micro_batch_size_does_not_change_the_run(assets: Path, uninterrupted: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "micro")
    settings["data"]["sources"][0]["micro_batch_size"] = 2
    settings["data"]["num_workers"] = 1
    run_distributed(train_run, 2, settings)
    assert losses(tmp_path / "micro") == pytest.approx(losses(uninterrupted), rel=1e-5)
    assert read_ledger(tmp_path / "micro") == read_ledger(uninterrupted)


def test_the_loss_falls(uninterrupted: Path) -> None:
    found = losses(uninterrupted)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("stop_after", [pytest.param(1, marks=pytest.mark.long), 2, 5])
def test_an_interrupted_and_resumed_run_is_the_same_run(
    assets: Path, uninterrupted: Path, tmp_path: Path, stop_after: int
) -> None:
    settings = run_settings(assets, tmp_path / "run")
    run_distributed(train_run, 2, settings, stop_after)
    run_distributed(train_run, 2, settings)
    assert losses(tmp_path / "run") == losses(uninterrupted), "bit for bit"
    assert read_ledger(tmp_path / "run") == read_ledger(uninterrupted)


def stop_by_a_signal(world: World, settings: dict[str, Any]) -> str:
    """Send SIGTERM to rank 1 alone in its third step."""

    class Signal(StepObserver):
        def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
            if world.rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    return train_error(world, settings, [Signal()])


def test_a_signal_to_one_rank_saves_and_stops_all_ranks(assets: Path, uninterrupted: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    for error in run_distributed(stop_by_a_signal, 2, settings):
        assert error.startswith("PreemptedError") and "3 of 6" in error
    assert find_checkpoint(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step-00000003"
    run_distributed(train_run, 2, settings)
    assert losses(tmp_path / "run") == losses(uninterrupted)
    assert read_ledger(tmp_path / "run") == read_ledger(uninterrupted)


# The memory budget makes two of three transformer blocks be recomputed.
@pytest.mark.parametrize("how", [{"activation_checkpointing": True}, {"activation_memory_gib": 0.0005}])
def test_activation_checkpointing_does_not_change_the_losses(
    assets: Path, uninterrupted: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    run_distributed(train_run, 2, run_settings(assets, tmp_path / "run", **how))
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted), rel=1e-5)


def test_an_offloaded_optimizer_does_not_change_the_losses(assets: Path, uninterrupted: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    settings["deepspeed"]["offload_optimizer"] = {"device": "cpu"}
    run_distributed(train_run, 2, settings)
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted), rel=1e-5)


def test_bfloat16_trains(assets: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_distributed(train_run, 2, run_settings(assets, tmp_path / "run", dtype="bfloat16"))
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(losses(uninterrupted)[0], rel=0.02)
    assert all(math.isfinite(loss) for loss in found) and found[-1] < found[0]


def test_token_sum_divides_by_documents(assets: Path, uninterrupted: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run", loss_normalization="token_sum", steps=1)
    settings["schedule"]["warmup_steps"] = 1
    run_distributed(train_run, 2, settings)
    [summed], mean = read_metrics(tmp_path / "run"), read_metrics(uninterrupted)[0]
    assert summed["samples/pairs"] == mean["samples/pairs"] == 8
    # Both sum over the same tokens; the mean divides by several trained tokens for each document.
    assert summed["loss/pairs"] > 2 * mean["loss/pairs"]


def test_no_checkpoint_holds_frozen_weights(uninterrupted: Path) -> None:
    checkpoint = find_checkpoint(uninterrupted / "checkpoints")
    assert checkpoint is not None
    for path in checkpoint.glob("*model_states.pt"):
        state = torch.load(path, weights_only=False)
        names = list(state["module"])
        assert names and not [name for name in names if name.startswith(("vision_encoder.", "language_model.lm."))]
    from trainer.checkpoint.catalog import read_state

    frozen = read_state(checkpoint).frozen
    assert any(name.startswith("vision_encoder.") for name in frozen)
    assert any(name.startswith("language_model.lm.") for name in frozen)


def frozen_before_and_after(world: World, settings: dict[str, Any]) -> dict[str, Any]:
    from model.parameters import frozen_digests, full_shape
    from tests.deepspeed_engine.zero_state import local_part
    from trainer import loop
    from trainer.deepspeed_engine.engine import gathered_parameters
    from trainer.tasks.flamingo import build_flamingo_task

    config = as_config(settings)
    task = build_flamingo_task(config, world)
    module: Any = task.module
    matrix: Any = dict(module.named_parameters())["language_model.lm.model.layers.0.mlp.up_proj.weight"]
    partitioned = matrix.numel() == 0 and local_part(matrix).numel() * world.size >= math.prod(full_shape(matrix))
    trainable_before = [local_part(parameter).clone() for parameter in module.cross_attention.parameters()]
    loop.train(task, config, world)
    moved = [
        bool((local_part(parameter) != before).any())
        for parameter, before in zip(module.cross_attention.parameters(), trainable_before, strict=True)
    ]
    return {
        "partitioned": partitioned,
        "device": str(local_part(matrix).device),
        "before": task.frozen,
        "after": frozen_digests(task.module, gathered_parameters),
        "moved": any(moved),
    }


def test_the_frozen_model_is_partitioned_and_never_changes(assets: Path, tmp_path: Path) -> None:
    for result in run_distributed(frozen_before_and_after, 2, run_settings(assets, tmp_path / "run")):
        assert result["partitioned"] and result["device"] == "cpu"
        assert result["before"] == result["after"]
        assert result["moved"], "the trainable part must move, or the test shows nothing"


def uneven_media(world: World, assets: Path) -> float:
    """Return the gradient norm of a step in which rank 0 has media and rank 1 has none."""
    from tests.data.helpers import SAMPLE
    from trainer.config.deepspeed_json import deepspeed_json
    from trainer.data.batch import BatchFormat, Row, collate
    from trainer.tasks.flamingo import build_flamingo_task

    config = as_config(run_settings(assets, assets / f"uneven-{world.size}"))
    config = replace(config, data=replace(config.data, sources=config.data.sources[:1]))
    task = build_flamingo_task(config, world)
    engine = Engine(task.module, config.optimizer, deepspeed_json(config), world)
    image_id, end_of_chunk_id = 11, 12  # after the 11 words of the tokenizer
    ids = torch.tensor([1, image_id, 4, 5, end_of_chunk_id])
    image = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    seen = Row(ids, ids.clone(), torch.tensor([-1, 0, 0, 0, 0]), (image,), (SAMPLE,))
    text = Row(ids[2:], ids[2:].clone(), torch.full((3,), -1), (), (SAMPLE,))
    rows = [seen, seen, text, text]
    mine = rows[world.rank * 4 // world.size : (world.rank + 1) * 4 // world.size]
    batch = collate(mine, BatchFormat(pad_id=0, image_size=16), source="pairs")
    engine.forward_backward(batch.inputs, scale=0.25, is_last=True)
    return engine.step(1.0).grad_norm


def test_a_rank_without_media_neither_hangs_nor_changes_the_gradient(assets: Path) -> None:
    alone = run_distributed(uneven_media, 1, assets)
    together = run_distributed(uneven_media, 2, assets)
    assert alone[0] > 0
    assert together == pytest.approx([alone[0]] * 2, rel=1e-4)


@pytest.fixture
def interrupted(assets: Path, uninterrupted: Path, tmp_path: Path) -> dict[str, Any]:
    """Return settings of a run that has trained 6 of 8 steps."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    return run_settings(assets, tmp_path / "run", steps=8)


def test_another_model_is_refused(interrupted: dict[str, Any]) -> None:
    interrupted["model"]["resampler"]["num_layers"] = 2
    for error in run_distributed(train_error, 2, interrupted):
        assert "model.resampler.num_layers" in error


def test_another_data_seed_is_refused(interrupted: dict[str, Any]) -> None:
    interrupted["data"]["seed"] = 5
    for error in run_distributed(train_error, 2, interrupted):
        assert re.search(r"\bseed\b.*\b0\b.*\b5\b", error)


def test_another_frozen_language_model_is_refused(interrupted: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_assets(other, seed=1)
    name = interrupted["model"]["language_model"]["name"]
    shutil.copytree(name, tmp_path / "kept")
    shutil.rmtree(name)
    try:
        shutil.copytree(other / "lm", name)
        for error in run_distributed(train_error, 2, interrupted):
            assert "frozen" in error and "language_model.lm" in error
    finally:
        shutil.rmtree(name)
        shutil.copytree(tmp_path / "kept", name)


def test_a_non_finite_step_is_skipped_and_logged_and_too_many_end_the_run(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run", max_skipped_in_a_row=2)
    settings["optimizer"]["lr"] = 1e38  # the first applied step destroys the weights
    settings["schedule"] = {"warmup_steps": 0, "decay": "constant"}
    for error in run_distributed(train_error, 2, settings):
        assert "max_skipped_in_a_row" in error
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step_skipped"] is True and lines[0]["step_skipped"] is False
    skipped = {line["step"] for line in lines if line["step_skipped"]}
    assert skipped.isdisjoint(sample[0] for sample in read_ledger(tmp_path / "run"))


def train_until_too_many_bad_samples(world: World, settings: dict[str, Any]) -> None:
    """Expect the same error on every rank, though only some ranks met bad samples in that step."""
    from trainer.data.errors import TooManyBadSamplesError

    with pytest.raises(TooManyBadSamplesError, match=r"(?s)'pairs'.*empty_image \d+.*data\.max_bad_fraction"):
        train_run(world, settings)


def test_too_many_bad_samples_stop_every_rank(assets: Path, tmp_path: Path) -> None:
    good = {"png": image_bytes(size=(16, 16)), "txt": b"a red sky"}
    bad = {"png": b"", "txt": b"a red sky"}
    samples = ((f"p{n}", bad if n % 6 == 0 else good) for n in range(60))
    write_shard(tmp_path / "bad" / "0.tar", samples)
    build_manifest(tmp_path / "bad")
    settings = run_settings(assets, tmp_path / "run")
    settings["data"]["sources"][0]["manifest"] = str(tmp_path / "bad/manifest.npz")
    settings["data"] |= {"max_bad_fraction": 0.15, "bad_window": 20}
    run_distributed(train_until_too_many_bad_samples, 2, settings)
    lines = read_metrics(tmp_path / "run")
    assert 0 < len(lines) < 6
    assert lines[-1]["replaced_samples/empty_image"] == lines[-1]["replaced_samples"] > 0
