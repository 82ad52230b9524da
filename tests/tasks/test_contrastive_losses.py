"""The contrastive losses equal their definitions, in chunks and with duplicates, and random states are replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from model.internals import TorchDispatchMode
from tests.distributed.contrastive_steps import batch_of, towers, write_towers
from trainer.config.contrastive_config import ContrastiveLossConfig
from trainer.runtime.distributed import World
from trainer.tasks.contrastive.exact_step import ContrastiveStep
from trainer.tasks.contrastive.losses import Features, softmax_loss, solve

WORLD = World(0, 1, 0, torch.device("cpu"))
N, DIM = 7, 5


def features(scale: float = 10.0, bias: float | None = None) -> Features:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(N, DIM, generator=generator), dim=-1) for _ in range(2))
    return Features(image, text, torch.tensor([scale]), None if bias is None else torch.tensor([bias]))


def gradients_by_autograd(given: Features, loss_of: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = given.leaves()
    loss = loss_of(leaves) * N
    return loss.detach(), list(torch.autograd.grad(loss, leaves.tensors()))


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
def test_the_softmax_loss_is_open_clips(rows_per_chunk: int) -> None:
    config = ContrastiveLossConfig(rows_per_chunk=rows_per_chunk)
    solution = solve(features(), None, [N], config, WORLD, 1.0)
    loss, expected = gradients_by_autograd(features(), lambda f: ClipLoss()(f.image_ND, f.text_ND, f.logit_scale))
    assert float(solution.losses[0]) == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip(solution.gradients.tensors(), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("rows_per_chunk", [2, 100])
def test_the_sigmoid_loss_is_open_clips(rows_per_chunk: int) -> None:
    config = ContrastiveLossConfig(kind="sigmoid", rows_per_chunk=rows_per_chunk)
    solution = solve(features(bias=-3.0), None, [4, 3], config, WORLD, 1.0)
    loss, expected = gradients_by_autograd(
        features(bias=-3.0), lambda f: SigLipLoss()(f.image_ND, f.text_ND, f.logit_scale, f.logit_bias)
    )
    assert sum(map(float, solution.losses)) == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip(solution.gradients.tensors(), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_captions_are_not_negatives(smoothing: float) -> None:
    captions = torch.arange(N)[:, None].repeat(1, 3)
    captions[2] = captions[0]
    config = ContrastiveLossConfig(label_smoothing=smoothing, rows_per_chunk=2)
    solution = solve(features(), captions, [N], config, WORLD, 1.0)
    given, expected = features(), 0.0
    for own, others in ((given.image_ND, given.text_ND), (given.text_ND, given.image_ND)):
        for row in range(N):
            kept = [column for column in range(N) if {row, column} != {0, 2}]
            log_p = (10 * own[row] @ others[kept].T).log_softmax(0)
            target = torch.full((len(kept),), smoothing / len(kept))
            target[kept.index(row)] += 1 - smoothing
            expected -= float((target * log_p).sum()) / 2
    assert float(solution.losses[0]) == pytest.approx(expected, rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in solution.gradients.tensors())


def test_smoothing_without_duplicates_is_torchs() -> None:
    logits, labels = torch.randn(4, 6), torch.arange(4)
    nothing = torch.zeros(4, 6, dtype=torch.bool)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert softmax_loss(logits, labels, None, 0.1) == expected
    assert torch.allclose(softmax_loss(logits, labels, nothing, 0.1), expected)


def test_the_temperature_leaves_its_limit_but_never_goes_beyond() -> None:
    config = ContrastiveLossConfig(max_logit_scale=20.0)
    wants_less = solve(features(30.0), None, [N], config, WORLD, 1.0).gradients.logit_scale
    matched = Features(features().image_ND, features().image_ND, torch.tensor([30.0]))
    wants_more = solve(matched, None, [N], config, WORLD, 1.0).gradients.logit_scale
    assert float(wants_less) > 0 and float(wants_more) == 0


class PlainEngine:
    """Run towers without DeepSpeed, and keep the features of every forward pass."""

    def __init__(self, module: Any) -> None:
        self.world, self.module = WORLD, module
        self.passes: list[Tensor] = []

    def forward(self, inputs: Any) -> Any:
        output = self.module(**inputs)
        self.passes.append(torch.cat([output[0], output[1]]).detach())
        return output

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()


def test_the_second_pass_drops_out_what_the_first_did(tmp_path: Path) -> None:
    module = towers(write_towers(tmp_path, timm_drop=0.5))
    engine = PlainEngine(module.train())
    batches = [batch_of("web", slice(start, start + 4)) for start in range(0, 16, 4)]
    step = ContrastiveStep(ContrastiveLossConfig(), mask_duplicates=True, merged=False)
    step(engine, batches, {"web": 1 / 16})  # type: ignore[arg-type]
    without_graph, first, again = engine.passes[:3], engine.passes[3], engine.passes[4:]
    assert all(torch.equal(a, b) for a, b in zip(without_graph, again, strict=True))
    next_step = torch.cat(module(**batches[0].inputs)[:2])
    assert not torch.equal(first, next_step)
    torch.manual_seed(0)
    step(engine, batches, {"web": 1 / 16})  # type: ignore[arg-type]
    after = torch.rand(1)
    torch.manual_seed(0)
    for batch in (*batches[1:], batches[0]):
        module(**batch.inputs)
    assert torch.equal(after, torch.rand(1)), "the next step would draw numbers of this one again"


def test_memory_does_not_grow_with_the_batch_but_for_the_features(tmp_path: Path) -> None:
    """No tensor of the loss has rows times columns, whatever the number of rows."""
    rows = 512
    image = F.normalize(torch.randn(rows, 4), dim=-1)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    with Sizes():
        solve(
            Features(image, image, torch.tensor([1.0])),
            torch.arange(rows)[:, None],
            [rows],
            ContrastiveLossConfig(rows_per_chunk=16),
            WORLD,
            1.0,
        )
    assert max(sizes) == 16 * rows
