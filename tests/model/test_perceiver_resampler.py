"""Compare the resampler with the paper's pseudo-code, which concatenates keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import PerceiverResamplerConfig
from model.factory import build_flamingo
from model.flops import UsefulFlops, Workload
from model.parameters import trainable_parameters
from model.perceiver_resampler import PerceiverResampler, build_resampler, interpolate_time
from tests.model.builders import BEYOND, text_with_media, tiny_config

CONFIG = PerceiverResamplerConfig(num_layers=2, dim=12, num_heads=3, head_dim=8, num_latents=5, num_frames=4)


def resampler(config: PerceiverResamplerConfig = CONFIG, vision_dim: int = 10) -> PerceiverResampler:
    torch.manual_seed(0)
    module = PerceiverResampler(config, vision_dim)
    with torch.no_grad():  # move the norms away from the identity
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def by_the_paper(module: PerceiverResampler, features: Tensor) -> Tensor:
    """Compute x_f = flatten(x + time); latents += attention(q=latents, kv=[x_f, latents]); latents += ffn(latents)."""
    num_media, num_frames, per_frame, _ = features.shape
    x = module.project(features) + module.time_embeddings[:num_frames, None]
    x = x.reshape(num_media, num_frames * per_frame, -1)
    latents = module.latents.repeat(num_media, 1, 1)
    for layer in module.layers:
        a, f = layer.attention, layer.feed_forward
        normed = F.layer_norm(latents, (12,), a.norm_latents.weight, a.norm_latents.bias)
        both = torch.cat([F.layer_norm(x, (12,), a.norm_features.weight, a.norm_features.bias), normed], 1)
        keys, values = (both @ a.key_value.weight.T).chunk(2, -1)
        split = lambda t: t.view(num_media, -1, 3, 8).transpose(1, 2)  # noqa: E731
        scores = split(normed @ a.query.weight.T) @ split(keys).transpose(-1, -2) * 8**-0.5
        out = (scores.softmax(-1) @ split(values)).transpose(1, 2).reshape(num_media, -1, 24)
        latents = latents + out @ a.output.weight.T
        wide = F.layer_norm(latents, (12,), f.norm.weight, f.norm.bias) @ f.up.weight.T
        latents = latents + (F.relu(wide) ** 2) @ f.down.weight.T
    return F.layer_norm(latents, (12,), module.norm.weight, module.norm.bias)


@pytest.mark.parametrize("num_frames", [1, 3, 4])
@pytest.mark.parametrize("per_frame", [1, 7])
def test_the_resampler_equals_the_papers_pseudo_code(num_frames: int, per_frame: int) -> None:
    module = resampler()
    features = torch.randn(3, num_frames, per_frame, 10)
    torch.testing.assert_close(module(features), by_the_paper(module, features))


def test_the_activation_is_a_setting() -> None:
    features = torch.randn(1, 1, 4, 10)
    squared, gelu = resampler(), resampler(replace(CONFIG, activation="gelu"))
    assert squared.state_dict().keys() == gelu.state_dict().keys()
    assert not torch.allclose(squared(features), gelu(features))


def test_projection_and_norm_can_be_left_out() -> None:
    module = resampler(replace(CONFIG, dim=None, final_norm=False), vision_dim=12)
    assert module.dim == 12
    assert not any(name.startswith(("project", "norm.")) for name in module.state_dict())
    assert module(torch.randn(2, 1, 3, 12)).shape == (2, 5, 12)


def test_media_of_different_lengths_do_not_affect_one_another() -> None:
    module = resampler()
    media = [torch.randn(1, num_frames, per_frame, 10) for num_frames, per_frame in ((1, 3), (4, 2), (2, 6))]
    flat = torch.cat([m.flatten(0, 2) for m in media])
    lengths = torch.tensor([0, *(m[0, ..., 0].numel() for m in media)])
    frame = torch.cat([torch.arange(m.shape[1]).repeat_interleave(m.shape[2]) for m in media])
    together = module(flat, lengths.cumsum(0), frame)
    torch.testing.assert_close(together, torch.cat([module(m) for m in media]))


def test_order_of_frames_matters_and_order_within_a_frame_does_not() -> None:
    module = resampler()
    features = torch.randn(1, 3, 4, 10)
    torch.testing.assert_close(module(features), module(features.flip(2)))
    assert not torch.allclose(module(features), module(features.flip(1)), atol=1e-4)


def test_time_embeddings_are_interpolated_linearly() -> None:
    trained = torch.tensor([[0.0, 5.0], [1.0, 3.0], [4.0, 3.0]])
    assert torch.equal(interpolate_time(trained, 3), trained)
    assert torch.equal(interpolate_time(trained, 2), trained[:2])
    expected = torch.tensor([[0.0, 5.0], [0.5, 4.0], [1.0, 3.0], [2.5, 3.0], [4.0, 3.0]])
    torch.testing.assert_close(interpolate_time(trained, 5), expected)
    assert torch.equal(interpolate_time(trained[:1], 3), trained[:1].repeat(3, 1))
    bfloat = interpolate_time(trained.bfloat16(), 5)
    assert bfloat.dtype == torch.bfloat16


def test_thirty_frames_of_the_papers_evaluation() -> None:
    module = resampler()
    assert module(torch.randn(1, 30, 2, 10)).shape == (1, 5, 12)


def test_features_with_a_wrong_number_of_dimensions_are_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"\[M, F, S, V\]"):
        resampler()(torch.randn(2, 3, 10))


def test_the_transformer_attends_among_features_too() -> None:
    module = build_resampler(replace(CONFIG, kind="transformer", num_layers=2), 10)
    features = torch.randn(2, 2, 7, 10)
    latents = module(features)
    assert latents.shape == (2, 5, 12)
    layer = module.layers[0]
    x = torch.cat(
        [module.latents.expand(2, -1, -1), (module.project(features) + module.time_embeddings[:2, None]).flatten(1, 2)],
        1,
    )
    for layer in module.layers:
        a = layer.attention
        normed = a.norm_latents(x)
        q, (k, v) = a.query(normed), a.key_value(normed).chunk(2, -1)
        heads = [t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (q, k, v)]
        x = x + a.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(x)
    torch.testing.assert_close(latents, module.norm(x[:, :5]))
    with pytest.raises(ValueError, match="takes squares only"):
        module(features.flatten(0, 2), torch.tensor([0, 28]))


def test_the_mlp_gives_a_latent_for_each_feature() -> None:
    module = build_resampler(replace(CONFIG, kind="mlp"), 10)
    features = torch.randn(2, 7, 10)
    latents = module(features)
    assert latents.shape == (2, 7, 12)
    projected = features @ module.project.weight.T + module.bias
    hidden = F.relu(module.feed_forward.norm(projected) @ module.feed_forward.up.weight.T).square()
    torch.testing.assert_close(latents, projected + hidden @ module.feed_forward.down.weight.T)
    assert torch.equal(module(features[:1]), latents[:1])


@pytest.mark.parametrize("kind", ["perceiver", "linear", "mlp", "transformer"])
@pytest.mark.parametrize("gate", ["scalar", "vector", "none"])
def test_every_kind_trains_in_a_flamingo(kind: Any, gate: Any) -> None:
    settings = tiny_config()
    model = build_flamingo(
        replace(
            settings,
            resampler=replace(settings.resampler, kind=kind),
            cross_attention=replace(settings.cross_attention, gate=gate),
        ),
        BEYOND,
    )
    ids, media = text_with_media()
    assert UsefulFlops.of(model).row(Workload(1, 12)) > 0
    for step in range(2):
        model(ids, labels=ids, media=media).loss.backward()
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                assert parameter.grad is not None, name
                parameter -= 0.01 * parameter.grad
                if step:
                    assert parameter.grad.abs().sum() > 0 or "norm_features" in name or "time" in name, name
                parameter.grad = None
