"""Packed documents: the same logits, loss and gradients as alone, in every family that is said to keep them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.flamingo import Flamingo
from model.language_model import separates_packed_documents
from tests.model.builders import BEYOND, FAMILIES, random_media, random_text, text_with_media, tiny_flamingo

LENGTHS = (12, 9, 7)
SEPARATES = {"llama", "gpt_neox", "qwen3", "gemma3", "mistral", "gpt2", "phi"}


def documents() -> tuple[list[Tensor], Tensor]:
    """Three documents, the first with two media, the others with one each; and the four media."""
    (first, second), _ = text_with_media()
    third = random_text(1, 7, seed=3)[0]
    third[2] = BEYOND.image_id
    return [row[:length] for row, length in zip((first, second, third), LENGTHS, strict=True)], random_media(4)


def packed(parts: list[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids of one row; the padding is a document of its own, as the collator makes it."""
    ids = torch.cat([*parts, torch.zeros(padding, dtype=torch.int64)])
    return ids[None], torch.cat([torch.arange(n) for n in (*map(len, parts), padding)])[None]


def largest_difference(model: Flamingo) -> float:
    """Between the logits of documents packed in two equal rows and their own."""
    parts, media = documents()
    ids, positions = packed(parts, 5)
    both = torch.cat([media, media])
    with torch.no_grad():
        together = model(ids.repeat(2, 1), media=both, position_ids=positions.repeat(2, 1)).logits
        media_of = media.split([2, 1, 1])
        alone = [model(part[None], media=own).logits[0] for part, own in zip(parts, media_of, strict=True)]
    return max(float((row[: sum(LENGTHS)] - torch.cat(alone)).abs().max()) for row in together)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_are_known_for_what_they_do(family: str) -> None:
    model = tiny_flamingo(family, gates=0.7)
    separates = separates_packed_documents(model.language_model.lm)
    assert separates == (family in SEPARATES)
    difference = largest_difference(model)
    assert difference < 2e-5 if separates else difference > 1e-2


def test_state_space_layers_are_not_attention() -> None:
    lm: Any = tiny_flamingo().language_model.lm
    lm.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert not separates_packed_documents(lm)


def test_loss_and_gradient_are_the_documents_own() -> None:
    parts, media = documents()
    ids, positions = packed(parts, 5)
    labels = ids.masked_fill(positions == 0, -100)
    labels[0, sum(LENGTHS) :] = -100
    gradients, losses = [], []
    for _ in range(2):
        model = tiny_flamingo(gates=0.7)
        if losses:
            pieces = zip(parts, labels[0].split([*LENGTHS, 5]), media.split([2, 1, 1]), strict=False)
            loss = sum(model(part[None], labels=own[None], media=seen).loss for part, own, seen in pieces)
        else:
            loss = model(ids, labels=labels, media=media, position_ids=positions).loss
        loss.backward()
        losses.append(float(torch.as_tensor(loss).detach()))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)


def test_another_document_changes_nothing() -> None:
    """No attention across documents, in the language model or to media: other neighbors, bit for bit the same."""
    model = tiny_flamingo(gates=0.7)
    parts, media = documents()
    ids, positions = packed(parts, 5)
    other = ids.clone()
    other[0, :12][ids[0, :12] != BEYOND.image_id] = 7
    changed = torch.cat([255 - media[:2], media[2:]])
    with torch.no_grad():
        before = model(ids, media=media, position_ids=positions).logits[0, 12:]
        after = model(other, media=changed, position_ids=positions).logits[0, 12:]
    assert torch.equal(before, after)
