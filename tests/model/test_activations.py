"""Compare the memory counted without values with the memory of a real forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.activations import AllocatedMemory, MicroBatch, SavedTensors, count_activations
from model.config import CrossAttentionConfig, PerceiverResamplerConfig
from model.factory import torch_dtype
from model.parameters import trainable_parameters
from tests.model.builders import random_media, random_text, text_with_media, tiny_flamingo

ROWS, TOKENS, MEDIA = 4, 32, 8
# The fused ops need a head_dim that is a multiple of 16.
WIDE = {
    "cross_attention": CrossAttentionConfig(every_n_layers=2, head_dim=16, num_heads=4),
    "resampler": PerceiverResamplerConfig(num_layers=2, dim=20, num_heads=2, head_dim=16, num_latents=4, num_frames=2),
}


@pytest.mark.parametrize("checkpointed", [0, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "float32"), ("llama", "bfloat16")])
def test_the_count_is_that_of_a_real_step(family: str, dtype: str, packed: bool, checkpointed: int) -> None:
    model = tiny_flamingo(family, gates=0.5, **WIDE).to(torch_dtype(dtype))  # type: ignore[arg-type]
    model.set_activation_checkpointing(checkpointed)
    batch = MicroBatch(ROWS, TOKENS, MEDIA, packed=packed)
    counted = count_activations(model, batch, torch_dtype(dtype))  # type: ignore[arg-type]
    ids = random_text(ROWS, TOKENS)
    positions = (torch.arange(TOKENS) % 16).expand(ROWS, TOKENS)
    inputs = {"position_ids": positions} if packed else {}  # training gives no mask
    index = torch.arange(TOKENS)[None] // 16 + 2 * torch.arange(ROWS)[:, None]
    for parameter in trainable_parameters(model).values():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with AllocatedMemory() as memory:
        with SavedTensors(model) as saved:
            loss = model(ids, labels=ids, media=random_media(MEDIA), media_index=index, **inputs).loss
        loss.backward()
    assert counted.saved == pytest.approx(saved.total, rel=0.02)
    assert counted.peak == pytest.approx(memory.peak, rel=0.02)
    assert sum(counted.blocks) < counted.saved


def test_the_count_of_a_projector_with_shared_heads() -> None:
    """Every feature is a key, heads share keys, groups of media are seen together, the feed-forward is masked."""
    cross = CrossAttentionConfig(
        head_dim=16,
        num_heads=4,
        num_kv_heads=2,
        qk_norm="rms_norm",
        norm="rms_norm",
        activation="swiglu",
        gate="vector",
        media_groups=True,
        without_media="nothing",
    )
    projector = PerceiverResamplerConfig(kind="linear", dim=20)
    model = tiny_flamingo(gates=0.5, cross_attention=cross, resampler=projector)
    counted = count_activations(model, MicroBatch(ROWS, TOKENS, MEDIA), torch.float32)
    ids = random_text(ROWS, TOKENS)
    index = torch.arange(TOKENS)[None] // 16 + 2 * torch.arange(ROWS)[:, None]
    for parameter in trainable_parameters(model).values():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with AllocatedMemory() as memory:
        with SavedTensors(model) as saved:
            loss = model(ids, labels=ids, media=random_media(MEDIA), media_index=index).loss
        loss.backward()
    assert counted.saved == pytest.approx(saved.total, rel=0.05)
    assert counted.peak == pytest.approx(memory.peak, rel=0.05)


def gradients(checkpointed: bool | int) -> dict[str, Tensor]:
    model = tiny_flamingo(gates=0.5).train()
    model.set_activation_checkpointing(checkpointed)
    ids, media = text_with_media()
    model(ids, labels=ids, media=media).loss.backward()
    return {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [1, 2, True])
def test_recomputing_some_blocks_gives_the_same_gradients(checkpointed: bool | int) -> None:
    expected, found = gradients(False), gradients(checkpointed)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_recomputing_more_blocks_than_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="the language model has 3 blocks"):
        tiny_flamingo().set_activation_checkpointing(4)
