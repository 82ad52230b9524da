"""Augmentation on the device makes the loader's pixels, which depend on the sample alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.data.helpers import noise, saved
from trainer.config.contrastive_config import ContrastiveLossConfig
from trainer.config.data_config import AugmentConfig, ImageTextSource
from trainer.data.batch import Batch, BatchFormat, Row, SampleId, collate
from trainer.data.samples.contrastive_rows import ContrastiveBuilder
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.rows import join, sample_rng
from trainer.runtime.distributed import World
from trainer.tasks.contrastive.exact_step import ContrastiveStep
from trainer.tasks.contrastive.towers import ContrastiveTowers

SIZE = 16
ALL = AugmentConfig(0.5, (0.3, 1.0), (0.75, 1.33), 0.4, 0.4, 0.4, 0.1)


def row(index: int, *, on_device: bool, epoch: int = 0, seed: int = 0, fit: Any = "pad", augment: Any = ALL) -> Row:
    """Return the row of a sample whose image is wide, tall or square."""
    source = ImageTextSource("pairs", "pairs.npz", 4)
    decoder = ImageDecoder(SIZE, fit, augment=augment)
    build = ContrastiveBuilder(source, lambda text: torch.tensor([3, len(text), 1]), decoder, on_device)
    image = noise(20 + 9 * (index % 3), 40 - 6 * (index % 4), index)
    sample = SampleId("pairs", epoch, "a.tar", index, f"k{index}")
    members = {"png": saved(image, "PNG"), "txt": b"a" * (1 + index)}
    return build(members, sample, sample_rng(seed, sample))


def batch(rows: list[Row]) -> Batch:
    joined = [join([one], max_tokens=9) for one in rows]  # as the stream does with one sample, too
    return collate(joined, BatchFormat(0, SIZE), source="pairs")


def pixels(rows: list[Row]) -> torch.Tensor:
    return batch(rows).to("cpu").media


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_the_device_makes_what_the_loader_makes(fit: Any) -> None:
    ours = pixels([row(index, on_device=True, fit=fit) for index in range(24)])
    loaders = pixels([row(index, on_device=False, fit=fit) for index in range(24)])
    difference = (ours.int() - loaders.int()).abs()
    # The loader flips before it resizes: rounding may differ, and where the center is cut, it may be a column aside.
    assert difference.float().mean() < (4 if fit == "crop" else 0.1)
    colors = AugmentConfig(0.0, (0.3, 1.0), (0.75, 1.33), 0.4, 0.4, 0.4, 0.1)
    pair = [pixels([row(i, on_device=one, fit=fit, augment=colors) for i in range(24)]) for one in (True, False)]
    assert torch.equal(*pair)
    plain = [pixels([row(i, on_device=one, fit=fit, augment=None) for i in range(4)]) for one in (True, False)]
    assert torch.equal(*plain)


def test_pixels_depend_on_seed_sample_and_epoch_alone() -> None:
    together = pixels([row(index, on_device=True) for index in range(70)])
    for index in (0, 5, 69):
        assert torch.equal(pixels([row(index, on_device=True)])[0], together[index])
    backwards = pixels([row(index, on_device=True) for index in reversed(range(70))])
    assert torch.equal(backwards.flip(0), together)
    others = [row(5, on_device=True, epoch=1), row(5, on_device=True, seed=1)]
    assert len({tuple(one.flatten().tolist()) for one in (together[5], *pixels(others))}) == 3


def test_every_forward_of_a_batch_sees_the_same_pixels() -> None:
    made = batch([row(index, on_device=True) for index in range(4)])
    first, second = made.to("cpu"), made.to("cpu")
    assert torch.equal(first.media, second.media) and not torch.equal(first.media, made.media)
    assert torch.equal(first.to("cpu").media, first.media)  # they are changed once
    assert "device_changes" not in first.inputs


class SmallClip(torch.nn.Module):
    """Two towers of one layer each, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(3 * SIZE * SIZE, 8), torch.nn.Embedding(99, 8)
        self.dropout, self.logit_scale = torch.nn.Dropout(0.2), torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.dropout(self.image(images.flatten(1))), self.text(ids).mean(1)
        return (*(torch.nn.functional.normalize(one, dim=-1) for one in features), self.logit_scale.exp())


class PlainEngine:
    """What ``ContrastiveStep`` needs of an engine."""

    def __init__(self, module: ContrastiveTowers) -> None:
        self.module, self.world = module, World(0, 1, 0, torch.device("cpu"))
        self.seen: list[torch.Tensor] = []

    def forward(self, inputs: dict[str, Any]) -> Any:
        self.seen.append(inputs["media"])
        return self.module(input_ids=inputs["input_ids"], media=inputs["media"])

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        loss.backward()


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_make_the_step_of_the_whole_batch(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    monkeypatch.setattr("open_clip.get_model_preprocess_cfg", lambda _: statistics)
    rows = [row(index, on_device=True) for index in range(8)]
    gradients, seen = [], []
    for parts in (1, micro_batches):
        torch.manual_seed(0)
        clip = SmallClip()
        clip.dropout.p = 0.0  # the draws of dropout are those of a batch, which differs
        engine = PlainEngine(ContrastiveTowers(clip))
        size = len(rows) // parts
        step = ContrastiveStep(ContrastiveLossConfig(), mask_duplicates=True, merged=False)
        step(engine, [batch(rows[size * i : size * (i + 1)]) for i in range(parts)], {"pairs": 1 / 8})  # type: ignore[arg-type]
        gradients.append([parameter.grad for parameter in clip.parameters()])
        seen.append(torch.cat(engine.seen))
    for whole, split in zip(*gradients, strict=True):
        assert (whole - split).norm() <= 1e-6 * whole.norm()
    # All but the first micro-batch are seen twice, with the same pixels.
    assert torch.equal(seen[1], torch.cat([seen[0][size:], seen[0][:size], seen[0][size:]]))
