"""Compare the summed cross-entropy with torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import loss as loss_module
from model.loss import find_target_positions, gather_labels, summed_cross_entropy


@pytest.mark.parametrize("rows", [0, 1, 4, 9])
def test_value_and_gradient_equal_torchs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", 4)
    logits = (5 * torch.randn(rows, 11)).requires_grad_()
    labels = torch.randint(0, 11, (rows,))
    weight = 0.37
    (expected,) = torch.autograd.grad(weight * F.cross_entropy(logits, labels, reduction="sum"), logits)
    total = summed_cross_entropy(logits, labels)
    (found,) = torch.autograd.grad(weight * total, logits)
    torch.testing.assert_close(total, F.cross_entropy(logits, labels, reduction="sum"))
    torch.testing.assert_close(found, expected)


def test_gradient_equals_finite_differences() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (5,))
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, labels), logits)


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4000, 50).bfloat16().requires_grad_()
    labels = torch.randint(0, 50, (4000,))
    total = summed_cross_entropy(logits, labels)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, F.cross_entropy(logits.float(), labels, reduction="sum"), rtol=1e-5, atol=0)
    total.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_ids_between_the_tokens_get_no_gradient() -> None:
    logits = torch.randn(3, 6)
    logits[:, 4] = -torch.inf
    logits.requires_grad_()
    total = summed_cross_entropy(logits, torch.tensor([0, 1, 5]))
    total.backward()
    assert total.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, 4].any()


def test_target_positions_and_their_labels() -> None:
    labels = torch.tensor([[9, 1, -100, 2], [-100, -100, 3, -100]])
    positions = find_target_positions(labels)
    assert positions.tolist() == [0, 2, 5]
    assert gather_labels(labels, positions).tolist() == [1, 2, 3]


@pytest.mark.parametrize("token_ids", [[11, 12], [4, 9], [10, 13]])
@pytest.mark.parametrize("rows", [0, 3, 10])
def test_the_loss_fused_with_the_head(rows: int, token_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with logits that exist, in three chunks, for added tokens beyond the table, inside it, and in both."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 4 * 11 * 4)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    new = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    table, bias = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    allowed = sorted({*range(11), *token_ids})
    labels = torch.tensor([allowed[i % len(allowed)] for i in range(rows)], dtype=torch.int64).flip(0)
    columns = [hidden @ table[i] + bias[i] for i in range(11)]
    columns += [hidden.new_full((rows,), -torch.inf)] * (max(token_ids) - 10)
    for token, row in zip(token_ids, new, strict=True):
        columns[token] = hidden @ row
    expected = 0.37 * F.cross_entropy(torch.stack(columns, -1), labels, reduction="sum")
    found = 0.37 * loss_module.head_cross_entropy(hidden, new, table, bias, token_ids, labels)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(
        torch.autograd.grad(found, [hidden, new]), torch.autograd.grad(expected, [hidden, new]), strict=True
    ):
        torch.testing.assert_close(mine, other)
