"""Compare the gated block with a loop over tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import CrossAttentionConfig
from model.gated_cross_attention import GatedCrossAttentionBlock
from model.media_index import first_media

CONFIG = CrossAttentionConfig(num_heads=2, head_dim=8)


def block(config: CrossAttentionConfig = CONFIG, gates: tuple[float, float] = (0.4, -0.8)) -> GatedCrossAttentionBlock:
    torch.manual_seed(0)
    module = GatedCrossAttentionBlock(config, dim=12, media_dim=10)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        module.attention_gate.fill_(gates[0])
        module.feed_forward_gate.fill_(gates[1])
    return module


def normed(norm: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, torch.nn.RMSNorm):
        return x * (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).rsqrt() * norm.weight
    if isinstance(norm, torch.nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)
    return x


def by_hand(module: GatedCrossAttentionBlock, y: Tensor, latents: Tensor, sees: list[list[int]]) -> Tensor:
    """Compute one row [L, D], where ``sees`` lists the media of each token."""
    a, f = module.attention, module.feed_forward
    media = a.media_norm(latents)
    out = torch.zeros_like(y)
    for token, numbers in enumerate(sees):
        if numbers:
            keys, values = (torch.cat([media[n] for n in numbers]) @ a.key_value.weight.T).chunk(2, -1)
            q = a.query.weight @ normed(a.norm, y[token])
            heads = []
            for h in range(a.num_heads):
                part, kv = slice(8 * h, 8 * h + 8), 8 * (h * a.num_kv_heads // a.num_heads)
                k, v = normed(a.key_norm, keys[:, kv : kv + 8]), values[:, kv : kv + 8]
                heads.append((k @ normed(a.query_norm, q[part]) * 8**-0.5).softmax(0) @ v)
            out[token] = a.output.weight @ torch.cat(heads)
    y = y + module.attention_gate.tanh() * out
    x = normed(f.norm, y)
    wide = x @ f.up.weight.T
    if f.activation == "swiglu":
        wide = F.silu(x @ f.gate.weight.T) * wide
    else:
        relu = F.relu(wide)
        wide = {"squared_relu": relu**2, "gelu": F.gelu(wide), "relu": relu}[f.activation]
    return y + module.feed_forward_gate.tanh() * (wide @ f.down.weight.T)


@pytest.mark.parametrize("media_norm", [True, False])
@pytest.mark.parametrize("activation", ["squared_relu", "gelu", "relu", "swiglu"])
def test_the_block_equals_a_loop(media_norm: bool, activation: str) -> None:
    module = block(replace(CONFIG, media_norm=media_norm, activation=activation))
    y, latents = torch.randn(2, 5, 12), torch.randn(3, 4, 10)
    index = torch.tensor([[-1, 0, 0, 1, 1], [2, 2, -1, -1, 2]])
    out = module(y, latents, index)
    for row in range(2):
        sees = [[i] if i >= 0 else [] for i in index[row].tolist()]
        torch.testing.assert_close(out[row], by_hand(module, y[row], latents, sees))


@pytest.mark.parametrize("qk_norm", [None, "rms_norm", "layer_norm"])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_the_settings_of_other_families(qk_norm: str | None, num_kv_heads: int | None, gate: str) -> None:
    changes = {"qk_norm": qk_norm, "num_kv_heads": num_kv_heads, "gate": gate, "num_heads": 4}
    module = block(replace(CONFIG, norm="rms_norm", activation="swiglu", ff_dim=20, **changes))  # type: ignore[arg-type]
    assert module.feed_forward.up.weight.shape == (20, 12)
    assert module.attention_gate.shape == ((1,) if gate == "scalar" else (12,))
    if gate == "vector":
        with torch.no_grad():
            module.attention_gate.copy_(torch.randn(12))
    y, latents = torch.randn(1, 5, 12), torch.randn(3, 4, 10)
    index = torch.tensor([[-1, 0, 0, 1, 2]])
    sees: list[list[int]] = [[], [0], [0], [1], [2]]
    torch.testing.assert_close(module(y, latents, index)[0], by_hand(module, y[0], latents, sees))


def test_tokens_without_media_may_get_nothing() -> None:
    module = block(replace(CONFIG, without_media="nothing"))
    y, latents = torch.randn(1, 3, 12), torch.randn(1, 4, 10)
    index = torch.tensor([[-1, 0, 0]])
    out = module(y, latents, index, has_media_BL=index >= 0)
    assert torch.equal(out[0, 0], y[0, 0])
    torch.testing.assert_close(out[0, 1:], by_hand(module, y[0, 1:], latents, [[0], [0]]))
    assert torch.equal(module(y, None, None), y)


def test_a_token_may_see_all_media_so_far() -> None:
    module = block()
    y, latents = torch.randn(1, 5, 12), torch.randn(3, 4, 10)
    index = torch.tensor([[-1, 0, 1, 1, 2]])
    out = module(y, latents, index, first_media(index))
    torch.testing.assert_close(out[0], by_hand(module, y[0], latents, [[], [0], [0, 1], [0, 1], [0, 1, 2]]))


def test_without_media_only_the_feed_forward_runs() -> None:
    module = block()
    y = torch.randn(1, 5, 12)
    torch.testing.assert_close(module(y, None, None)[0], by_hand(module, y[0], torch.zeros(0, 4, 10), [[]] * 5))


def test_closed_gates_are_the_identity_bit_for_bit() -> None:
    module = block(gates=(0.0, 0.0))
    y = torch.randn(2, 5, 12)
    assert torch.equal(module(y, torch.randn(3, 4, 10), torch.zeros(2, 5, dtype=torch.int64)), y)


def test_projected_media_replace_latents() -> None:
    module = block()
    y, latents = torch.randn(2, 5, 12), torch.randn(3, 4, 10)
    index = torch.tensor([[-1, 0, 0, 1, 1], [2, 2, -1, -1, 2]])
    projected = module.project_media(latents)
    assert [x.shape for x in projected] == [(3, 4, 2, 8)] * 2
    assert torch.equal(module(y, None, index, keys_values=projected), module(y, latents, index))


def test_shapes_of_the_parameters() -> None:
    module = block()
    assert module.attention_gate.shape == module.feed_forward_gate.shape == (1,)
    assert not any(name.endswith("bias") and "norm" not in name for name in module.state_dict())
    assert list(module.state_dict()) == [
        "attention_gate",
        "feed_forward_gate",
        *(f"attention.{norm}.{part}" for norm in ("norm", "media_norm") for part in ("weight", "bias")),
        *(f"attention.{name}.weight" for name in ("query", "key_value", "output")),
        *(f"feed_forward.{name}" for name in ("norm.weight", "norm.bias", "up.weight", "down.weight")),
    ], "names of exports"
    assert "attention.media_norm.weight" in module.state_dict()
    assert "attention.media_norm.weight" not in block(replace(CONFIG, media_norm=False)).state_dict()


def test_heads_fill_the_dim_unless_their_number_is_given() -> None:
    assert GatedCrossAttentionBlock(CrossAttentionConfig(head_dim=4), 12, 10).attention.num_heads == 3
    with pytest.raises(ValueError, match=r"cross_attention\.head_dim 8 does not divide .* 12"):
        GatedCrossAttentionBlock(CrossAttentionConfig(head_dim=8), 12, 10)
    with pytest.raises(ValueError, match=r"cross_attention\.num_kv_heads 3 does not divide the 4 heads"):
        GatedCrossAttentionBlock(CrossAttentionConfig(head_dim=3, num_kv_heads=3), 12, 10)
