"""Test that the baseline of ``trainer.benchmark openflamingo`` is the same model, and test the mixture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import LanguageModelConfig, VisionEncoderConfig
from model.factory import build_language_model
from model.flamingo import Flamingo
from model.presets import openflamingo
from tests.benchmarks.openflamingo_baseline import Baseline, PaddedBatch, padded_batch
from tests.model.builders import BEYOND, FAMILIES, IMAGE_SIZE, tower_folder
from trainer.benchmark.openflamingo import build
from trainer.benchmark.synthetic_mixture import Mixture, make_mixture, packed_batches, packed_rows, padding_share
from trainer.data.batch import Batch


@pytest.fixture(scope="module")
def model() -> Flamingo:
    architecture = {**FAMILIES["llama"], "tie_word_embeddings": True, "max_position_embeddings": 512}
    config = openflamingo(LanguageModelConfig(architecture=architecture), every_n_layers=2)
    config = replace(
        config,
        vision=VisionEncoderConfig(name=f"local-dir:{tower_folder()}", feature_norm=False),
        resampler=replace(config.resampler, num_layers=2, num_heads=2, head_dim=16, num_latents=4),
        cross_attention=replace(config.cross_attention, num_heads=2, head_dim=16),
    )
    return build(config, BEYOND, "float32")


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return make_mixture(4, BEYOND, IMAGE_SIZE)


@pytest.fixture(scope="module")
def baseline(model: Flamingo) -> Baseline:
    return Baseline(model, build_language_model(model.config.language_model, torch.float32))


def batches(mixture: Mixture) -> dict[str, tuple[Batch, PaddedBatch]]:
    packed = packed_batches(mixture, BEYOND, IMAGE_SIZE)
    return {
        "documents": (packed["documents"], padded_batch(mixture.documents, 256, 6, BEYOND.pad_id)),
        "pairs": (packed["pairs"], padded_batch(mixture.pairs, 64, 1, BEYOND.pad_id)),
    }


@pytest.mark.parametrize("source", ["documents", "pairs"])
def test_the_baseline_is_the_same_model(model: Flamingo, baseline: Baseline, mixture: Mixture, source: str) -> None:
    packed, padded = batches(mixture)[source]
    ours = model(**packed.inputs).loss / packed.num_trained_tokens
    theirs = baseline(padded)
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-4)
    block, gated = model.cross_attention[0], baseline.lm.model.layers[1].cross_attention
    our_parameters = [model.resampler.latents, block.attention.key_value.weight, block.attention_gate]
    their_parameters = [baseline.perceiver.latents, gated.attention.to_kv.weight, gated.attention_gate]
    gradients = zip(
        torch.autograd.grad(ours, our_parameters), torch.autograd.grad(theirs, their_parameters), strict=True
    )
    for mine, other in gradients:
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_other_images_give_another_loss(model: Flamingo, mixture: Mixture) -> None:
    packed, _ = batches(mixture)["pairs"]
    with torch.no_grad():
        other = model(**(packed.inputs | {"media": 255 - packed.media})).loss
        assert abs(other - model(**packed.inputs).loss) / packed.num_trained_tokens > 1e-4


def test_the_mixture_is_as_described() -> None:
    found = make_mixture(400, BEYOND, 1)
    assert (len(found.documents), len(found.pairs)) == (400, 800)
    images = [len(document.media) for document in found.documents]
    assert set(images) == {1, 2, 3, 4, 5, 6}
    assert sum(images) / len(images) == pytest.approx(2.5, abs=0.15)
    assert {len(document.input_ids) for document in found.documents} == {256}
    assert all(int((d.input_ids == BEYOND.image_id).sum()) == len(d.media) for d in found.documents)
    captions = [len(pair.input_ids) - 3 for pair in found.pairs]
    assert (min(captions), max(captions)) == (8, 40)


def test_packing_keeps_every_pair_and_wastes_little() -> None:
    pairs = make_mixture(40, BEYOND, 1).pairs
    rows = packed_rows(pairs)
    assert sum(len(row.samples) for row in rows) == len(pairs)
    assert sum(len(row.media) for row in rows) == len(pairs)
    assert max(len(row.input_ids) for row in rows) <= 256
    assert padding_share(list(packed_batches(make_mixture(40, BEYOND, 1), BEYOND, 1).values())) <= 0.05
