"""Test that all sides of ``trainer.benchmark generate`` answer the same, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from model.config import LanguageModelConfig, VisionEncoderConfig
from model.presets import openflamingo
from tests.model.builders import BEYOND, FAMILIES, IMAGE_SIZE, tower_folder
from trainer.benchmark import generate as benchmark
from trainer.benchmark.openflamingo import build


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tiny model in the place of the measured one, on one thread."""
    config = openflamingo(
        LanguageModelConfig(architecture={**FAMILIES["llama"], "max_position_embeddings": 256}), every_n_layers=2
    )
    config = replace(
        config,
        vision=VisionEncoderConfig(name=f"local-dir:{tower_folder()}", feature_norm=False),
        resampler=replace(config.resampler, num_layers=2, num_heads=2, head_dim=16, num_latents=4),
        cross_attention=replace(config.cross_attention, num_heads=2, head_dim=16),
    )
    monkeypatch.setattr(benchmark, "measured_model", lambda: config)
    monkeypatch.setattr(benchmark, "TOKENS", BEYOND)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_sides_give_the_same_answers() -> None:
    model = build(benchmark.measured_model(), BEYOND, "float32")
    work = benchmark.make_workload(3, 10, 4, IMAGE_SIZE)
    answers = benchmark.ours(model, work)
    assert answers == benchmark.plain_loop(model, work) == benchmark.one_by_one(model, work)
    assert [len(answer) for answer in answers] == [4, 4, 4]


def test_rows_compare_with_both_baselines() -> None:
    rows = benchmark.run("cpu", num_queries=1, new_tokens=2)
    assert len(rows) == 8
    assert {row.baseline for row in rows} == {benchmark.PLAIN_LOOP, benchmark.ONE_BY_ONE}
    for row in rows:
        assert row.baseline_value is not None
        assert row.ratio == pytest.approx(row.value / row.baseline_value)
        assert (row.target is None) == (row.baseline == benchmark.ONE_BY_ONE)


def test_other_answers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "plain_loop", lambda model, work: [[0]] * len(work.prompts))
    with pytest.raises(RuntimeError, match="another model ran"):
        benchmark.run("cpu", num_queries=1, new_tokens=2)
