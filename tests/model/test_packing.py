"""Check that packed documents have the logits, loss and gradients that they have alone, where the LM separates them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from model import language_model
from model.flamingo import Flamingo
from model.internals import attention_implementation
from model.lm_probes import separates_packed_documents
from tests.model.builders import BEYOND, FAMILIES, random_media, random_text, text_with_media, tiny_flamingo

LENGTHS = (12, 9, 7)
SEPARATES = {"llama", "gpt_neox", "qwen3", "gemma3", "mistral", "gpt2", "phi"}


def documents() -> tuple[list[Tensor], Tensor]:
    """Return three documents, the first with two media, the others with one each, and the four media."""
    (first, second), _ = text_with_media()
    third = random_text(1, 7, seed=3)[0]
    third[2] = BEYOND.image_id
    return [row[:length] for row, length in zip((first, second, third), LENGTHS, strict=True)], random_media(4)


def packed(parts: list[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Return input_ids and position_ids of one row, whose padding is a document of its own, as in the collator."""
    ids = torch.cat([*parts, torch.zeros(padding, dtype=torch.int64)])
    return ids[None], torch.cat([torch.arange(n) for n in (*map(len, parts), padding)])[None]


def largest_difference(model: Flamingo) -> float:
    """Return the largest difference between the logits of documents packed in two equal rows and alone."""
    parts, media = documents()
    ids, positions = packed(parts, 5)
    both = torch.cat([media, media])
    with torch.no_grad():
        together = model(ids.repeat(2, 1), media=both, position_ids=positions.repeat(2, 1)).logits
        media_of = media.split([2, 1, 1])
        alone = [model(part[None], media=own).logits[0] for part, own in zip(parts, media_of, strict=True)]
    return max(float((row[: sum(LENGTHS)] - torch.cat(alone)).abs().max()) for row in together)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_probe_agrees_with_the_whole_model(family: str) -> None:
    model = tiny_flamingo(family, gates=0.7)
    separates = separates_packed_documents(model.language_model.lm)
    assert separates == (family in SEPARATES)
    difference = largest_difference(model)
    assert difference < 2e-5 if separates else difference > 1e-2


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "mamba"},
        {
            "model_type": "lfm2",
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "full_attention", "conv", "conv"],
        },
        {"model_type": "qwen3_next", "num_hidden_layers": 4},
    ],
    ids=lambda architecture: architecture["model_type"],
)
def test_layers_other_than_attention_do_not_separate(architecture: dict[str, Any]) -> None:
    assert not separates_packed_documents(on_meta(architecture))


@pytest.mark.parametrize(
    "architecture",
    [
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
            "num_attention_heads": 64,
        },
        {"model_type": "gemma3_text", "num_hidden_layers": 48},
        {"model_type": "gemma3"},  # with a vision tower
        {"model_type": "phi3", "pad_token_id": 32_000},
        {"model_type": "qwen3_moe"},
    ],
    ids=lambda architecture: architecture["model_type"],
)
def test_large_models_are_probed_small(architecture: dict[str, Any]) -> None:
    """Check models too large to build here; time and memory show that the probe does not build them either."""
    state = torch.get_rng_state()
    assert separates_packed_documents(on_meta(architecture))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_probed_is_named() -> None:
    lm = on_meta({"model_type": "llama", "num_hidden_layers": 2})
    lm.config.hidden_act = "no such activation"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be probed .*no such activation.*packing"):
        separates_packed_documents(lm)


def on_meta(architecture: dict[str, Any]) -> Any:
    """Build a language model without memory for its weights."""
    settings = dict(architecture)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))


def test_packed_documents_have_their_own_loss_and_gradient() -> None:
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


def test_changing_a_document_leaves_the_others_bit_for_bit_equal() -> None:
    """Check that no token attends to another document, in the language model or to its media."""
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


def attend_by_offsets(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any) -> Any:
    """Compute what FlashAttention computes from offsets: each document by itself, whatever row it is in."""
    assert mask is None
    offsets = kwargs["cu_seq_lens_q"]
    assert (offsets.dtype, kwargs["max_length_q"]) == (torch.int32, int(offsets.diff().max()))
    flat = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (query, key, value)]
    parts = zip(*(x.split(offsets.diff().tolist(), dim=1) for x in flat), strict=True)
    out = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts], dim=1)
    return out.transpose(0, 1).unflatten(0, (query.shape[0], -1)), None


@pytest.mark.parametrize("rows", [1, 2])
def test_flash_attention_gets_the_offsets_of_documents(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "offsets_on_cpu"  # transformers would look for a package under a name with "flash"
    AttentionInterface.register(name, attend_by_offsets)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    monkeypatch.setattr(language_model, "takes_document_offsets", lambda lm: attention_implementation(lm) == name)
    parts, media = documents()
    ids, positions = packed(parts, 5)
    model, results = tiny_flamingo(gates=0.7), []
    inputs = {"media": torch.cat([media] * rows), "position_ids": positions.repeat(rows, 1)}
    for attention in ("sdpa", name):
        model.language_model.lm.set_attn_implementation(attention)
        with torch.no_grad():
            results.append(model(ids.repeat(rows, 1), **inputs).logits)
    torch.testing.assert_close(*results)


def test_padding_after_the_tokens_needs_no_mask() -> None:
    model = tiny_flamingo(gates=0.7)
    ids, media = text_with_media()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    with torch.no_grad():
        with_mask, without = (model(ids, attention_mask=m, media=media).logits[mask == 1] for m in (mask, None))
    assert torch.equal(with_mask, without)
