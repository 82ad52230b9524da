"""A micro-step asks the device for no value: on a GPU the host would wait there until everything before is computed.

Run with fake tensors, which have shapes and no values: whatever needs one raises. What Hugging Face asks once a call
(whether a mask masks anything) it does not ask fake tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import LanguageModelConfig
from model.flamingo import Flamingo
from model.ops import library
from tests.model.builders import FAMILIES, IMAGE_SIZE, INSIDE, tiny_config, tiny_flamingo
from trainer.benchmark.mixture import make_mixture, packed_batches


class NoTensorOfHostValues(TorchDispatchMode):
    """Raises where a tensor is made of Python's numbers: on a GPU that is a copy which the host waits for."""

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
        resampler=replace(config.resampler, head_dim=16),  # as the fused ops take it
        cross_attention=replace(config.cross_attention, head_dim=16, attend=attend),
    )


def step(model: Flamingo, packed: bool = True, without: str = "") -> None:
    """Forward and backward of a batch as the collator makes it, but for one of its inputs."""
    if (reason := library.load_errors()["cpu"]) is not None:
        pytest.skip(f"the reference of the ops asks for values, and the fused ones are absent: {reason}")
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
def test_no_value_is_asked_for(family: str, attend: str, packed: bool) -> None:
    """gemma3: the loss is not fused with its head."""
    step(small_model(family, attend), packed)


def test_a_question_is_seen() -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        step(small_model("llama"), without="positions")


def test_a_tensor_of_host_values_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    forward = model.resampler.forward
    monkeypatch.setattr(model.resampler, "forward", lambda features: forward(features) * torch.tensor(1.0))
    with pytest.raises(AssertionError, match="host values"):
        step(model)
