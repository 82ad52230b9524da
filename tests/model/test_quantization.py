"""Test linear layers in 8 and 4 bits: their numbers, their gradient, and a Flamingo over a quantized language model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import quantization
from model.config import FlamingoConfig, QuantizationMethod, TrainableConfig
from model.factory import build_flamingo
from model.flops import UsefulFlops
from model.generation import generate
from model.parameters import frozen_digests, frozen_fingerprint, frozen_parameters, num_weights
from model.pretrained import from_pretrained, save_flamingo
from model.quantization import BLOCKS, QuantizedLinear, dequantize, level_pairs, levels, quantize
from tests.model.builders import BEYOND, random_media, random_text, tiny_config, wake
from trainer.planning.traffic import ModelSizes

METHODS: tuple[QuantizationMethod, ...] = ("int8", "nf4")
DTYPES = {"int8": torch.int8, "nf4": torch.uint8}
# The widest distance of a number to its code, where the largest of the block is 1; and the error of the tiny model.
WIDEST = {"int8": 0.501 / 127, "nf4": (1 - 0.69619) / 2 + 1e-5}
MOST_CHANGED, MOST_BYTES = {"int8": 0.05, "nf4": 0.6}, {"int8": 0.3, "nf4": 0.2}


def quantized_config(method: QuantizationMethod, family: str = "llama") -> FlamingoConfig:
    config = tiny_config(family)
    return replace(config, language_model=replace(config.language_model, quantization=method))


@pytest.mark.parametrize("columns", [256, 133, 8, 7])
@pytest.mark.parametrize("method", METHODS)
def test_every_number_is_near_its_code(method: QuantizationMethod, columns: int) -> None:
    weight = torch.randn(6, columns) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0
    block = BLOCKS[method]
    blocks = -(-columns // block)
    codes, scales = quantize(weight, method)
    found = dequantize(codes, scales, torch.float32, columns, level_pairs() if method == "nf4" else None)
    padded = torch.nn.functional.pad(weight, (0, blocks * block - columns))
    largest = padded.view(6, blocks, block).abs().amax(-1).repeat_interleave(block, 1)[:, :columns]
    assert codes.dtype == DTYPES[method] and scales.shape == (6 * blocks,)
    assert found.shape == weight.shape
    assert ((found - weight).abs() <= largest * WIDEST[method]).all()
    assert (found - weight).norm() < {"int8": 0.01, "nf4": 0.15}[method] * weight.norm()


def test_the_levels_of_nf4_are_those_of_qlora() -> None:
    # arXiv:2305.14314, appendix E
    published = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0, 0.0795803, 0.1609302]
    published += [0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
    assert levels() == pytest.approx(published, abs=1e-6)
    assert level_pairs()[0x2F].tolist() == pytest.approx([published[2], published[15]], abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradient_are_those_of_the_weight_that_the_codes_stand_for(method: QuantizationMethod) -> None:
    layer = QuantizedLinear(torch.randn(5, 9), torch.randn(5), method)
    weight = dequantize(layer.codes, layer.scales, torch.float32, 9, layer.pairs)
    assert layer.bias is not None
    x = torch.randn(2, 3, 9, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    F.linear(y, weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_blocks_are_quantized_and_the_error_is_stated(method: QuantizationMethod, family: str) -> None:
    model = build_flamingo(quantized_config(method, family), BEYOND)
    error = model.language_model.quantization_error
    assert error is not None
    assert 0 < error.relative < MOST_CHANGED[method]
    assert error.bytes_now < MOST_BYTES[method] * error.bytes_before
    assert method in str(error) and f"{error.relative:.2%}" in str(error)
    digests = frozen_digests(model)
    name = next(name for name in digests if name.endswith(".codes"))
    frozen_parameters(model)[name].data[0, 0] += 1
    assert {key for key, digest in frozen_digests(model).items() if digest != digests[key]} == {name}


@pytest.mark.parametrize("method", METHODS)
def test_codes_count_as_the_weights_that_they_stand_for(method: QuantizationMethod) -> None:
    whole, quantized = build_flamingo(tiny_config(), BEYOND), build_flamingo(quantized_config(method), BEYOND)
    assert UsefulFlops.of(quantized) == UsefulFlops.of(whole)

    def matrices(model: torch.nn.Module) -> int:
        return num_weights(parameter for parameter in model.parameters() if parameter.ndim > 1)

    assert matrices(quantized) == matrices(whole)


@pytest.mark.parametrize("method", METHODS)
def test_an_export_names_the_setting_and_generates_the_same(method: QuantizationMethod, tmp_path: Path) -> None:
    model = build_flamingo(quantized_config(method), BEYOND)
    wake(model, 0.5)
    save_flamingo(tmp_path, model)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.language_model.quantization == method
    assert frozen_fingerprint(loaded) == frozen_fingerprint(model)
    media = random_media(1)
    prompt = [BEYOND.image_id, 5, 6]
    one, other = (generate(each.eval(), [prompt], media, [1], max_new_tokens=4) for each in (model, loaded))
    assert one == other
    in_bfloat16 = from_pretrained(tmp_path, dtype="bfloat16").named_parameters()
    assert next(p for name, p in in_bfloat16 if "codes" in name).dtype == DTYPES[method]


@pytest.mark.parametrize("mode", ["full", "lora", "from_random"])
def test_a_language_model_that_trains_is_refused(mode: str) -> None:
    trainable = TrainableConfig(language_model=mode)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"quantization int8 .* {mode}"):
        build_flamingo(replace(quantized_config("int8"), trainable=trainable), BEYOND)


@pytest.mark.parametrize("recomputed", [0, 1])
def test_codes_turn_into_numbers_as_often_as_the_plan_counts(recomputed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = []

    def counting(*arguments: Any) -> Tensor:
        turned.append((weight := dequantize(*arguments)).numel())
        return weight

    monkeypatch.setattr(quantization, "dequantize", counting)
    model = build_flamingo(quantized_config("int8"), BEYOND)
    model.set_activation_checkpointing(recomputed)
    turned.clear()  # building compares logits
    text, images = random_text(2, 12), random_media(2)
    model(input_ids=text, labels=text, media_index=torch.zeros_like(text), media=images).loss.backward()
    sizes = ModelSizes(model)
    assert sizes.dequantized(recomputed) == sum(turned)
    assert sizes.dequantized(1) > sizes.dequantized(0) > 0
