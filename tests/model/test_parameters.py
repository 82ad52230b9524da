"""Check which parameters are frozen, and their fingerprint."""

from __future__ import annotations

import pytest
import torch

from model.parameters import (
    combine_digests,
    explain_difference,
    frozen_digests,
    frozen_fingerprint,
    frozen_parameters,
    trainable_parameters,
)
from tests.model.builders import tiny_flamingo


def test_every_parameter_is_trained_or_frozen() -> None:
    model = tiny_flamingo()
    trained, frozen = trainable_parameters(model), frozen_parameters(model)
    assert not trained.keys() & frozen.keys()
    assert trained.keys() | frozen.keys() == {name for name, _ in model.named_parameters()}
    parts = ("resampler.", "cross_attention.", "language_model.input_rows.", "language_model.output_rows.")
    assert all(name.startswith(parts) for name in trained)
    assert all(name.startswith(("vision_encoder.", "language_model.lm.")) for name in frozen)


def test_the_fingerprint_depends_on_frozen_weights_only() -> None:
    model = tiny_flamingo()
    fingerprint = frozen_fingerprint(model)
    assert fingerprint == frozen_fingerprint(tiny_flamingo())
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(1)
    assert frozen_fingerprint(model) == fingerprint
    assert frozen_fingerprint(tiny_flamingo(seed=1)) != fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_changed_number_is_named(family: str) -> None:
    model = tiny_flamingo(family)
    before = frozen_digests(model)
    assert frozen_parameters(model).keys() <= before.keys()
    name = [n for n in before if "language_model" in n][5]
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-6
    after = frozen_digests(model)
    assert explain_difference(before, after) == f"1 different: {name}"
    assert combine_digests(after) != combine_digests(before)


def test_the_fingerprint_covers_type_shape_and_buffers() -> None:
    class Frozen(torch.nn.Module):
        def __init__(self, tensor: torch.Tensor, persistent: bool = True) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(tensor, requires_grad=False)
            self.register_buffer("statistics", torch.ones(2), persistent=persistent)

    base = torch.zeros(4)
    prints = {frozen_fingerprint(Frozen(t)) for t in (base, base.view(2, 2), base.bfloat16(), torch.zeros(2), base + 1)}
    assert len(prints) == 5
    changed = Frozen(base)
    changed.statistics += 1
    assert frozen_fingerprint(changed) not in prints
    unstored = Frozen(base, persistent=False)
    expected = frozen_fingerprint(unstored)
    unstored.statistics += 1
    assert frozen_fingerprint(unstored) == expected


def test_differences_are_named() -> None:
    assert explain_difference({"a": "1"}, {"a": "1"}) == ""
    text = explain_difference({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"})
    assert text == "1 missing: c; 1 unexpected: d; 1 different: b"
    many = {str(i): "x" for i in range(9)}
    assert explain_difference(many, {}).endswith("4 and 4 more")
