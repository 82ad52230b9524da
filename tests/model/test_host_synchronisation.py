"""Check that a micro-step reads no value from the device: on a GPU the host would wait there for all earlier work.

Fake tensors have shapes and no values, so reading one raises. Hugging Face reads a mask once a call, to see whether it
masks anything; it does not do that with fake tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from model.config import LanguageModelConfig, PerceiverResamplerConfig
from model.flamingo import Flamingo
from model.internals import FakeTensorMode, TorchDispatchMode
from model.ops import library
from tests.model.builders import FAMILIES, IMAGE_SIZE, INSIDE, tiny_config, tiny_flamingo
from trainer.benchmark.synthetic_mixture import make_mixture, packed_batches


class NoTensorOfHostValues(TorchDispatchMode):
    """Raise where a tensor is made of Python's numbers: on a GPU the host waits for that copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor of host values is made within a step"
        return func(*args, **(kwargs or {}))


def small_model(family: str, attend: str = "one") -> Flamingo:
    long_enough = {**FAMILIES[family], "max_position_embeddings": 512}
    config = tiny_config()
    return tiny_flamingo(
        family,
        INSIDE,
        language_model=LanguageModelConfig(architecture=long_enough),
        resampler=replace(config.resampler, head_dim=16),  # the fused ops need a multiple of 16
        cross_attention=replace(config.cross_attention, head_dim=16, attend=attend),
    )


def step(model: Flamingo, packed: bool = True, without: str = "") -> None:
    """Run forward and backward of a batch from the collator, with one of its inputs left out."""
    if (reason := library.load_errors()["cpu"]) is not None:
        pytest.skip(f"the fused ops are absent, and their reference reads values: {reason}")
    batch = packed_batches(make_mixture(1, INSIDE, IMAGE_SIZE), INSIDE, IMAGE_SIZE)["pairs"]
    batch = batch if packed else replace(batch, position_ids=None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in batch.inputs.items()
            if name != without
        }
        with NoTensorOfHostValues():
            model(**inputs).loss.backward()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("family", "attend"), [("llama", "one"), ("llama", "all"), ("gemma3", "one")])
def test_no_value_is_read(family: str, attend: str, packed: bool) -> None:
    """Cover gemma3 too, whose loss is not fused with its head."""
    step(small_model(family, attend), packed)


def test_no_value_is_read_for_groups_of_media_through_a_projector() -> None:
    config = tiny_config()
    cross = replace(
        config.cross_attention, head_dim=16, num_kv_heads=2, media_groups=True, without_media="nothing", gate="vector"
    )
    projector = PerceiverResamplerConfig(kind="linear", dim=20)
    architecture = {**FAMILIES["llama"], "max_position_embeddings": 512}
    language_model = LanguageModelConfig(architecture=architecture)
    changes = {"cross_attention": cross, "resampler": projector, "language_model": language_model}
    step(tiny_flamingo("llama", INSIDE, **changes))


def test_reading_a_value_is_noticed() -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        step(small_model("llama"), without="target_positions")


def test_a_tensor_of_host_values_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    forward = model.resampler.forward
    monkeypatch.setattr(model.resampler, "forward", lambda features: forward(features) * torch.tensor(1.0))
    with pytest.raises(AssertionError, match="host values"):
        step(model)
