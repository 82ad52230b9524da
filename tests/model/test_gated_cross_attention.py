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


def by_hand(module: GatedCrossAttentionBlock, y: Tensor, latents: Tensor, sees: list[list[int]]) -> Tensor:
    """Compute one row [L, D], where ``sees`` lists the media of each token."""
    a, f = module.attention, module.feed_forward
    media = a.media_norm(latents)
    out = torch.zeros_like(y)
    for token, numbers in enumerate(sees):
        if numbers:
            keys, values = (torch.cat([media[n] for n in numbers]) @ a.key_value.weight.T).chunk(2, -1)
            q = a.query.weight @ F.layer_norm(y[token], (12,), a.norm.weight, a.norm.bias)
            heads = []
            for h in range(2):
                part = slice(8 * h, 8 * h + 8)
                heads.append((keys[:, part] @ q[part] * 8**-0.5).softmax(0) @ values[:, part])
            out[token] = a.output.weight @ torch.cat(heads)
    y = y + module.attention_gate.tanh() * out
    wide = F.layer_norm(y, (12,), f.norm.weight, f.norm.bias) @ f.up.weight.T
    wide = F.relu(wide) ** 2 if f.activation == "squared_relu" else F.gelu(wide)
    return y + module.feed_forward_gate.tanh() * (wide @ f.down.weight.T)


@pytest.mark.parametrize("media_norm", [True, False])
@pytest.mark.parametrize("activation", ["squared_relu", "gelu"])
def test_the_block_equals_a_loop(media_norm: bool, activation: str) -> None:
    module = block(replace(CONFIG, media_norm=media_norm, activation=activation))
    y, latents = torch.randn(2, 5, 12), torch.randn(3, 4, 10)
    index = torch.tensor([[-1, 0, 0, 1, 1], [2, 2, -1, -1, 2]])
    out = module(y, latents, index)
    for row in range(2):
        sees = [[i] if i >= 0 else [] for i in index[row].tolist()]
        torch.testing.assert_close(out[row], by_hand(module, y[row], latents, sees))


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
    assert "attention.media_norm.weight" in module.state_dict()
    assert "attention.media_norm.weight" not in block(replace(CONFIG, media_norm=False)).state_dict()


def test_heads_fill_the_dim_unless_their_number_is_given() -> None:
    assert GatedCrossAttentionBlock(CrossAttentionConfig(head_dim=4), 12, 10).attention.num_heads == 3
    with pytest.raises(ValueError, match=r"cross_attention\.head_dim 8 does not divide .* 12"):
        GatedCrossAttentionBlock(CrossAttentionConfig(head_dim=8), 12, 10)
