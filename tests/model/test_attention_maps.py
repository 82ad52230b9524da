"""Test the attention maps against hand computations and against the model's own output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.attention_maps import attention_maps, cross_attention_weights, perceiver_weights
from model.config import CrossAttentionConfig, PerceiverResamplerConfig
from model.flamingo import Flamingo
from model.media_inputs import media_inputs
from model.seen_media import SeenMedia
from tests.model.builders import BEYOND, random_media, tiny_config, tiny_flamingo

IMAGE, END = BEYOND.image_id, BEYOND.end_of_chunk_id
PROMPT, GENERATED = [1, IMAGE, 5, 6, END, IMAGE, 7], [8, 9, 10]


def test_weights_give_the_output_of_the_cross_attention() -> None:
    model = tiny_flamingo(gates=1.0)
    attention = model.cross_attention[0].attention
    generator = torch.Generator().manual_seed(0)
    hidden, latents = torch.randn(5, 32, generator=generator), torch.randn(3, 4, 20, generator=generator)
    seen = SeenMedia(torch.tensor([[-1, 0, 1, 2, 2]]), torch.tensor([[-1, 0, 1, 0, 2]]))
    weights = cross_attention_weights(attention, hidden, latents, seen)
    torch.testing.assert_close(weights.sum((1, 2)), torch.tensor([0.0, 1, 1, 1, 1]))
    q = attention.query(attention.norm(hidden)).view(5, 4, 8)
    k, _ = attention.project_media(latents)
    expected = torch.zeros(5, 3, 4)
    for token, (first, last) in enumerate([(0, -1), (0, 0), (1, 1), (0, 2), (2, 2)]):
        for head in range(4):
            if last >= 0:
                own = k[first : last + 1, :, head].flatten(0, 1) @ q[token, head] / 8**0.5
                expected[token, first : last + 1] += own.softmax(0).view(-1, 4) / 4
    torch.testing.assert_close(weights, expected)


def test_weights_give_the_output_of_the_resampler() -> None:
    model = tiny_flamingo(resampler=replace(tiny_config().resampler, num_heads=1))
    attention = model.resampler.layers[0].attention
    generator = torch.Generator().manual_seed(0)
    features, latents = torch.randn(6, 20, generator=generator), torch.randn(4, 20, generator=generator)
    to_features, to_latents = perceiver_weights(attention, features, latents)
    torch.testing.assert_close(to_features.sum(1) + to_latents.sum(1), torch.ones(4))
    keys = torch.cat([attention.norm_features(features), attention.norm_latents(latents)])
    values = attention.key_value(keys)[:, 8:]
    expected = attention(features, latents[None], torch.tensor([0, 6]))[0]
    torch.testing.assert_close(attention.output(torch.cat([to_features, to_latents], 1) @ values), expected)


@pytest.mark.parametrize("attend", ["one", "all"])
@pytest.mark.parametrize("kind", ["perceiver", "transformer", "linear"])
def test_maps_sum_to_one(attend: Any, kind: Any) -> None:
    config = tiny_config()
    model = tiny_flamingo(
        gates=1.0,
        cross_attention=CrossAttentionConfig(every_n_layers=1, head_dim=8, num_heads=4, attend=attend),
        resampler=replace(config.resampler, kind=kind) if kind != "linear" else PerceiverResamplerConfig(kind="linear"),
    )
    found = attention_maps(model, PROMPT, GENERATED, random_media(2))
    assert found.media.shape == (3, 2)
    assert [one.shape for one in found.patches] == [(3, 2, 2)] * 2
    torch.testing.assert_close(sum(one.sum((1, 2)) for one in found.patches), torch.ones(3))
    torch.testing.assert_close(torch.stack([one.sum((1, 2)) for one in found.patches], 1), found.media)
    if attend == "one":
        assert found.media.tolist() == [[0.0, pytest.approx(1.0)]] * 3
    else:
        assert (found.media > 0.05).all()


def test_one_layer_is_the_product_of_both_attentions() -> None:
    model = tiny_flamingo(gates=1.0, resampler=replace(tiny_config().resampler, num_layers=1))
    media = random_media(2)
    found = attention_maps(model, PROMPT, GENERATED, media)
    features = model.resampler.project_frames(model.vision_encoder(media))[1].flatten(0, 1)
    to_features, _ = perceiver_weights(model.resampler.layers[0].attention, features, model.resampler.latents)
    share = to_features / to_features.sum(1, keepdim=True)
    weights = _weights_by_hand(model, media)
    torch.testing.assert_close(found.patches[1].flatten(1), (weights @ share).detach(), atol=1e-6, rtol=1e-5)


def _weights_by_hand(model: Flamingo, media: torch.Tensor) -> torch.Tensor:
    """Average the weights over the second medium's latents from the inputs that hooks see."""
    inputs: list[torch.Tensor] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
        for block in model.cross_attention
    ]
    with torch.no_grad():
        model(torch.tensor([[*PROMPT, *GENERATED]]), media=media)
    for hook in hooks:
        hook.remove()
    latents, total = model.encode_media(media)[1], torch.zeros(3, 4)
    for block, hidden in zip(model.cross_attention, inputs, strict=True):
        attention = block.attention
        k, _ = attention.project_media(latents[None])
        q = attention.query(attention.norm(hidden[6:9])).view(3, 4, 8)
        total += torch.einsum("lhk,rhk->lhr", q, k[0]).div(8**0.5).softmax(-1).mean(1)
    return total / len(inputs)


def test_tokens_without_media_have_empty_maps() -> None:
    model = tiny_flamingo(gates=1.0)
    found = attention_maps(model, [1, 5], [6, IMAGE, 7, 8], random_media(1))
    assert found.media[:, 0].tolist() == [0.0, 0.0, pytest.approx(1.0), pytest.approx(1.0)]


def test_media_of_any_shape_and_videos_have_maps_of_their_shape() -> None:
    model = tiny_flamingo(gates=1.0)
    generator = torch.Generator().manual_seed(0)
    media = [
        torch.randint(0, 256, (frames, 3, 8 * rows, 8 * columns), dtype=torch.uint8, generator=generator)
        for frames, rows, columns in [(1, 2, 3), (2, 1, 4)]
    ]
    patches, grids = media_inputs(media, 8)
    found = attention_maps(model, PROMPT, GENERATED, patches, grids)
    assert [one.shape for one in found.patches] == [(3, 2, 3), (3, 1, 4)]
    torch.testing.assert_close(found.patches[1].sum((1, 2)), torch.ones(3))
    video = attention_maps(model, [1, IMAGE], [5], random_media(1, num_frames=2))
    assert video.patches[0].shape == (1, 2, 2)


def test_other_numbers_of_media_are_errors() -> None:
    with pytest.raises(ValueError, match="3 media, but the prompt has 2 <image> tokens"):
        attention_maps(tiny_flamingo(), PROMPT, GENERATED, random_media(3))
    with pytest.raises(ValueError, match="need a prompt with media"):
        attention_maps(tiny_flamingo(), [1, 5], [6], random_media(0))
