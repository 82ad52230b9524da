"""Check that a frozen NFNet standardizes its weights once, to the features that timm computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from model import standardized_convolutions
from model.config import VisionEncoderConfig
from model.internals import TorchDispatchMode
from model.parameters import frozen_digests
from model.standardized_convolutions import STANDARDIZED
from model.vision_encoder import VisionEncoder, build_tower
from tests.model.builders import random_media

NFNET = VisionEncoderConfig(name="timm:test_nfnet", image_size=64, feature_norm=False)
BIT = VisionEncoderConfig(name="timm:resnetv2_50x1_bit", image_size=64, feature_norm=False)


class Calls(TorchDispatchMode):
    """Count the calls of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def encoder(config: VisionEncoderConfig = NFNET, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    torch.manual_seed(0)
    tower = VisionEncoder(build_tower(config).to(dtype), config)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def by_timm(tower: VisionEncoder, media: Tensor) -> Tensor:
    """Return the features with the convolutions' own forward."""
    own = {module: vars(module).pop("forward") for module in tower.modules() if isinstance(module, STANDARDIZED)}
    assert own
    try:
        return tower(media)
    finally:
        for module, forward in own.items():
            vars(module)["forward"] = forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [NFNET, BIT], ids=["nfnet", "bit"])
def test_features_are_those_of_timm_bit_for_bit(config: VisionEncoderConfig, dtype: torch.dtype) -> None:
    tower, media = encoder(config, dtype), random_media(2, size=64)
    expected = by_timm(tower, media)
    assert torch.equal(tower(media), expected)
    assert torch.equal(tower(media), expected)


def test_weights_are_standardized_once() -> None:
    tower, media, calls = encoder(), random_media(1, size=64), [Calls(), Calls(), Calls()]
    for number, call in enumerate(calls):
        if number == 2:
            tower.to(torch.bfloat16)
        with call:
            tower(media)
    first, again, converted = (call.names["native_batch_norm"] for call in calls)
    assert first == converted > 0
    assert again == 0


def test_changed_weights_are_standardized_anew() -> None:
    tower, media = encoder(), random_media(1, size=64)
    before, digests = tower(media), frozen_digests(tower)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(tower(media), before)
    assert torch.equal(tower(media), by_timm(tower, media))
    assert digests.keys() == frozen_digests(tower).keys() == dict(tower.named_parameters()).keys()


def test_digests_are_those_of_the_published_weights() -> None:
    tower = encoder()
    digests = frozen_digests(tower)
    tower(random_media(1, size=64))
    assert frozen_digests(tower) == digests


def test_weights_that_train_get_gradients() -> None:
    tower, media = encoder(), random_media(1, size=64)
    tower(media)
    tower.requires_grad_(True)
    tower.set_training("full")
    tower(media).sum().backward()
    assert all(p.grad is not None for m in tower.modules() if isinstance(m, STANDARDIZED) for p in m.parameters())


def test_channels_last_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encoder()(random_media(2, size=64))
    for module in (standardized_convolutions, __import__("model.vision_encoder", fromlist=["x"])):
        monkeypatch.setattr(module, "memory_format", lambda device: torch.channels_last)
    tower = encoder()
    torch.testing.assert_close(tower(random_media(2, size=64)), expected, rtol=1e-4, atol=1e-4)
