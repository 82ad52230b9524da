"""Check that recomputation gives the same gradients from fewer stored activations, with each forward's own media."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.flamingo import Flamingo
from model.language_model import Call, calling
from model.parameters import trainable_parameters
from tests.model.builders import FAMILIES, random_media, random_text, text_with_media, tiny_flamingo


def gradients(model: Flamingo, checkpointing: bool) -> dict[str, Tensor]:
    """Return the gradients of two forwards with different media, whose backwards run in the opposite order."""
    model.set_activation_checkpointing(checkpointing)
    model.zero_grad()
    ids, media = text_with_media()
    other_ids, other_media = text_with_media(seed=5)
    first = model(ids, labels=ids, media=media).loss
    second = model(other_ids, labels=other_ids, media=other_media, media_index=torch.zeros_like(ids)).loss
    with calling(Call()):  # the settings of a later call must not matter
        second.backward()
        (3 * first).backward()
    return {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_gives_the_same_gradients(family: str) -> None:
    model = tiny_flamingo(family, gates=0.5).train()
    expected, found = gradients(model, False), gradients(model, True)
    assert all(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def stored_bytes(model: Flamingo, checkpointing: bool) -> int:
    model.set_activation_checkpointing(checkpointing)
    ids = random_text(4, 32)
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids, media=random_media(1), media_index=torch.zeros_like(ids))
    return total


def test_the_cross_attention_is_recomputed_too() -> None:
    model = tiny_flamingo(gates=0.5)
    calls: list[Any] = []
    model.cross_attention[1].feed_forward.register_forward_hook(lambda *args: calls.append(1))
    assert stored_bytes(model, True) < stored_bytes(model, False) / 2
    model.set_activation_checkpointing()
    ids, media = text_with_media()
    calls.clear()
    model(ids, labels=ids, media=media).loss.backward()
    assert len(calls) == 2


def test_nothing_is_recomputed_without_gradients() -> None:
    model = tiny_flamingo(gates=0.5)
    ids, media = text_with_media()
    with torch.no_grad():
        expected = model(ids, media=media).logits
        model.set_activation_checkpointing()
        assert torch.equal(model(ids, media=media).logits, expected)
