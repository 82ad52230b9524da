"""Test linear layers in 8 bits: their numbers, their gradient, and a Flamingo over a quantized language model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.config import FlamingoConfig, TrainableConfig
from model.factory import build_flamingo
from model.generation import generate
from model.parameters import frozen_digests, frozen_fingerprint, frozen_parameters
from model.pretrained import from_pretrained, save_flamingo
from model.quantization import BLOCK, QuantizedLinear, dequantize, quantize
from tests.model.builders import BEYOND, random_media, tiny_config, wake


def quantized_config(family: str = "llama") -> FlamingoConfig:
    config = tiny_config(family)
    return replace(config, language_model=replace(config.language_model, quantization="int8"))


@pytest.mark.parametrize("columns", [2 * BLOCK, BLOCK + 5, 7])
def test_every_number_is_off_by_half_a_step_of_its_block_at_most(columns: int) -> None:
    weight = torch.randn(6, columns) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0
    codes, scales = quantize(weight)
    steps = scales.view(6, -1).repeat_interleave(BLOCK, 1)[:, :columns]
    assert codes.dtype == torch.int8
    assert ((dequantize(codes, scales, torch.float32) - weight).abs() <= steps * 0.501).all()
    assert len(scales) == 6 * -(-columns // BLOCK)


def test_output_and_gradient_are_those_of_the_weight_that_the_codes_stand_for() -> None:
    layer = QuantizedLinear(torch.randn(5, 9), torch.randn(5))
    weight = dequantize(layer.codes, layer.scales, torch.float32)
    assert layer.bias is not None
    x = torch.randn(2, 3, 9, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    F.linear(y, weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_blocks_are_quantized_and_the_error_is_stated(family: str) -> None:
    model = build_flamingo(quantized_config(family), BEYOND)
    error = model.language_model.quantization_error
    assert error is not None
    assert 0 < error.relative < 0.05
    assert error.bytes_now < 0.3 * error.bytes_before
    assert f"{error.relative:.2%}" in str(error)
    digests = frozen_digests(model)
    name = next(name for name in digests if name.endswith(".codes"))
    frozen_parameters(model)[name].data[0, 0] += 1
    assert {key for key, digest in frozen_digests(model).items() if digest != digests[key]} == {name}


def test_an_export_names_the_setting_and_generates_the_same(tmp_path: Path) -> None:
    model = build_flamingo(quantized_config(), BEYOND)
    wake(model, 0.5)
    save_flamingo(tmp_path, model)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.language_model.quantization == "int8"
    assert frozen_fingerprint(loaded) == frozen_fingerprint(model)
    media = random_media(1)
    prompt = [BEYOND.image_id, 5, 6]
    one, other = (generate(each.eval(), [prompt], media, [1], max_new_tokens=4) for each in (model, loaded))
    assert one == other
    assert next(p for n, p in from_pretrained(tmp_path, dtype="bfloat16").named_parameters() if "codes" in n).dtype == (
        torch.int8
    )


@pytest.mark.parametrize("mode", ["full", "lora", "from_random"])
def test_a_language_model_that_trains_is_refused(mode: str) -> None:
    trainable = TrainableConfig(language_model=mode)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"quantization int8 .* {mode}"):
        build_flamingo(replace(quantized_config(), trainable=trainable), BEYOND)
