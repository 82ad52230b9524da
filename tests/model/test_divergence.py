"""Test the divergence from the language model alone, which a KL penalty adds to the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import TrainableConfig
from model.flamingo import Flamingo
from model.loss import find_target_positions, gather_labels, summed_cross_entropy, summed_divergence
from model.parameters import trainable_parameters
from tests.model.builders import BEYOND, INSIDE, STRADDLING, random_text, text_with_media, tiny_flamingo

ADAPTERS = TrainableConfig(language_model="lora")


def trained(gates: float = 0.5, trainable: TrainableConfig = ADAPTERS, tokens: object = BEYOND) -> Flamingo:
    """Return a model whose adapters and cross-attentions have moved from their start."""
    model = tiny_flamingo(tokens=tokens, gates=gates, trainable=trainable)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def expected_divergence(logits: Tensor, base: Tensor, counts: Tensor) -> Tensor:
    p, q = (each[..., counts].log_softmax(-1) for each in (logits, base))
    return (p.exp() * (p - q)).sum()


def test_value_and_gradient_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.loss._CHUNK_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    base = torch.randn(7, 11, dtype=torch.float64, generator=generator)
    counts = torch.ones(11, dtype=torch.bool)
    counts[[4, 10]] = False
    base[:, 10] = -torch.inf  # what a token that is never predicted has
    found = summed_divergence(logits, base, counts)
    torch.testing.assert_close(found, expected_divergence(logits, base, counts))
    gradients = [
        torch.autograd.grad(3 * value, logits)[0] for value in (found, expected_divergence(logits, base, counts))
    ]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][:, ~counts].any()


@pytest.mark.parametrize("tokens", [BEYOND, INSIDE, STRADDLING])
def test_the_base_is_the_language_model_without_adapters_and_cross_attention(tokens: object) -> None:
    ids = random_text(2, 9)
    model = trained(tokens=tokens)
    plain = tiny_flamingo(tokens=tokens, trainable=TrainableConfig())  # type: ignore[arg-type]
    own = model.language_model.own_tokens("cpu")
    with torch.no_grad():
        expected = plain.language_model(ids)[..., own]
        assert torch.equal(model.language_model.base_logits(ids)[..., own], expected)
        assert not torch.allclose(model.language_model(ids)[..., own], expected, atol=1e-2)  # adapters are on again
    assert own.sum() == 48 - sum(token < 48 for token in (tokens.image_id, tokens.end_of_chunk_id))  # type: ignore[attr-defined]


def test_loss_and_divergence_of_a_model() -> None:
    ids, media = text_with_media()
    model = trained()
    output = model(ids, labels=ids, media=media, diverges=True)
    positions = find_target_positions(ids)
    logits = model(ids, media=media).logits.flatten(0, 1)[positions]
    base = model.language_model.base_logits(ids).flatten(0, 1)[positions]
    torch.testing.assert_close(output.loss, summed_cross_entropy(logits, gather_labels(ids, positions)))
    torch.testing.assert_close(output.loss, model(ids, labels=ids, media=media).loss)
    torch.testing.assert_close(
        output.divergence, expected_divergence(logits, base, model.language_model.own_tokens("cpu"))
    )
    (output.loss + output.divergence).backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values() if parameter.ndim > 1)


def test_a_model_at_its_start_does_not_diverge() -> None:
    ids = random_text(2, 9)
    model = tiny_flamingo(trainable=ADAPTERS)
    assert float(model(ids, labels=ids, diverges=True).divergence.detach()) == 0
