"""Keep the linear layers of a frozen language model in 8 or 4 bits.

A row of a weight is cut into blocks. Each block keeps codes and one scale. ``int8`` has blocks of 128 numbers, and
scales the largest of them to 127. ``nf4`` has blocks of 64 numbers, scales the largest of them to 1, and takes the
nearest of 16 levels, which are quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E). A byte holds
two of its codes. A forward turns the codes back into the type of the activations and multiplies as before. The backward
does so once more, for the gradient of the input.

The codes are frozen parameters. So ZeRO-3 partitions, gathers and offloads them as it does others, and their digest is
part of ``frozen_digests``. torch's own int8 product (``torch._weight_int8pack_mm``) is private, has one scale a row and
no derivative. With hundreds of tokens in a micro-batch, turning codes back takes little beside the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from model.config import QuantizationMethod
from model.parameters import Gather, Partition, full_shape, no_gather

BLOCKS: dict[QuantizationMethod, int] = {"int8": 128, "nf4": 64}  # numbers of a row that share a scale
_LARGEST: dict[QuantizationMethod, int] = {"int8": 127, "nf4": 1}  # what the largest number of a block is scaled to
_NUM_PROBED = 64  # tokens of the probe, or as many as the language model has positions for
_STRIDE = 7919  # a prime: the ids of the probe spread over the vocabulary
_TAIL = 0.9677083  # probability of the outermost level of nf4, as in QLoRA


@dataclass(frozen=True)
class QuantizationError:
    """Compare the logits of a quantized language model to those before, on a fixed sequence of token ids.

    Attributes:
        method: How the weights are kept.
        relative: Root mean square of the difference, divided by that of the logits before.
        same_choice: Share of the positions whose most likely token is the same.
        num_tokens: Tokens of the sequence.
        bytes_before: Bytes of the quantized weights before.
        bytes_now: Bytes of their codes and scales.
    """

    method: QuantizationMethod
    relative: float
    same_choice: float
    num_tokens: int
    bytes_before: int
    bytes_now: int

    def __str__(self) -> str:
        """Describe the error and the bytes in one line."""
        return (
            f"language model in {self.method}: logits differ by {self.relative:.2%} (root mean square, "
            f"{self.num_tokens} probed tokens), the most likely token is the same at {self.same_choice:.0%} of them; "
            f"its linear layers take {self.bytes_now / 2**20:.4g} MiB instead of {self.bytes_before / 2**20:.4g} MiB"
        )


class QuantizedLinear(nn.Module):
    """Compute a linear layer whose frozen weight is kept as codes.

    Attributes:
        in_features: Size of the input.
        out_features: Size of the output.
    """

    pairs: Tensor  # the two levels of every byte of nf4; copying them to a device in each forward would make it wait

    def __init__(self, weight: Tensor, bias: Tensor | None, method: QuantizationMethod) -> None:
        """Quantize a weight, and copy the bias."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        codes, scales = quantize(weight, method)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        pairs = level_pairs().to(weight.device) if method == "nf4" else None
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """Return ``input @ weight.T + bias``, [..., outputs]."""
        output: Tensor = _QuantizedProduct.apply(input, self.codes, self.scales, self.pairs)
        return output if self.bias is None else output + self.bias


class _QuantizedProduct(torch.autograd.Function):
    """Multiply by a quantized weight. It keeps the parameters alone, which ZeRO-3 may partition until the backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, codes: Tensor, scales: Tensor, pairs: Tensor | None) -> Tensor:  # noqa: A002
        ctx.save_for_backward(codes, scales, pairs)
        ctx.columns = input.shape[-1]
        return F.linear(input, dequantize(codes, scales, input.dtype, ctx.columns, pairs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales, pairs = ctx.saved_tensors
        [gradient] = gradients
        return gradient @ dequantize(codes, scales, gradient.dtype, ctx.columns, pairs), None, None, None


def quantize(weight: Tensor, method: QuantizationMethod) -> tuple[Tensor, Tensor]:
    """Return a weight [outputs, inputs] as codes, and a scale for each block of each row, flat, in its type.

    Returns:
        Codes, int8 [outputs, inputs], or for ``nf4`` uint8 [outputs, inputs / 2, rounded up]; and the scales.
    """
    rows, columns = weight.shape
    block = BLOCKS[method]
    blocks = -(-columns // block)
    padded = F.pad(weight.detach(), (0, blocks * block - columns)).view(rows, blocks, block)
    scales = (padded.abs().amax(-1, keepdim=True).float() / _LARGEST[method]).to(weight.dtype)
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    scaled = (padded.float() / divisors).view(rows, -1)
    if method == "int8":
        codes = scaled.round().clamp(-_LARGEST[method], _LARGEST[method]).to(torch.int8)[:, :columns]
    else:
        borders = _float32([(low + high) / 2 for low, high in pairwise(levels())])
        nearest = torch.bucketize(scaled[:, : columns + columns % 2].contiguous(), borders.to(weight.device))
        codes = (nearest[:, ::2] * 16 + nearest[:, 1::2]).to(torch.uint8)
    return codes.contiguous(), scales.flatten()


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, columns: int, pairs: Tensor | None = None) -> Tensor:
    """Return the weight that ``quantize`` stored, [outputs, inputs].

    Args:
        codes: Codes of either method.
        scales: Their scales.
        dtype: Type of the result.
        columns: Inputs of the layer.
        pairs: The levels of ``level_pairs``, for codes of ``nf4``.
    """
    if pairs is None:
        block, values = BLOCKS["int8"], codes.to(dtype)
    else:
        block = BLOCKS["nf4"]
        values = F.embedding(codes.int(), pairs.to(dtype)).flatten(1)[:, :columns]
    rows = len(codes)
    by_block = scales.to(dtype).view(rows, -1, 1)
    if columns % block == 0:
        return (values.reshape(rows, -1, block) * by_block).view(rows, columns)
    return values * by_block.expand(-1, -1, block).reshape(rows, -1)[:, :columns]


def dequantize_bytes(method: QuantizationMethod, itemsize: int) -> float:
    """Return the bytes that ``dequantize`` reads and writes for each weight.

    Args:
        method: How the weights are kept.
        itemsize: Bytes of a weight of the result.
    """
    scaled = 2 * itemsize  # reads the values and writes the weights; few bytes are scales
    if method == "int8":
        return 1 + itemsize + scaled
    indices = 0.5 + 2 * 2  # a byte and an int32 serve two weights; the int32 is written and read
    return indices + itemsize + scaled


def num_quantized(module: nn.Module) -> int:
    """Return how many weights of a module are kept as codes."""
    layers = (layer for layer in module.modules() if isinstance(layer, QuantizedLinear))
    return sum(layer.in_features * layer.out_features for layer in layers)


def levels() -> list[float]:
    """Return the 16 levels of nf4 from -1 to 1: 8 quantiles above zero, 7 below it, and zero."""

    def quantiles(number: int) -> list[float]:
        step = (_TAIL - 0.5) / number
        return [NormalDist().inv_cdf(_TAIL - index * step) for index in range(number)]

    largest = quantiles(8)[0]
    return [-value / largest for value in quantiles(7)] + [0.0] + [value / largest for value in reversed(quantiles(8))]


def level_pairs() -> Tensor:
    """Return the levels of both codes of each byte, float32 [256, 2]."""
    return _float32([(high, low) for high in levels() for low in levels()])


def _float32(values: Sequence[float | tuple[float, ...]]) -> Tensor:
    """Return numbers on the CPU in float32, also where ``zero.Init`` rounds what torch's constructors make."""
    return torch.from_numpy(np.array(values, np.float32))


def quantize_language_model(
    lm: Any,
    blocks: Iterable[nn.Module],
    method: QuantizationMethod,
    gather: Gather = no_gather,
    partition: Partition = nullcontext,
) -> QuantizationError | None:
    """Replace the linear layers of a causal LM's blocks by quantized ones, in place.

    Args:
        lm: Hugging Face's causal LM, whose parameters may be partitioned.
        blocks: Its decoder blocks. The tables of embeddings outside them keep their type.
        method: How to keep the weights.
        gather: Context that makes partitioned parameters whole.
        partition: Context in which the quantized layers are made.

    Returns:
        The error of the logits; None on the meta device.

    Raises:
        ValueError: The blocks have no linear layers, or read the weights of one without calling it.
    """
    layers = [
        (parent, name, layer)
        for block in blocks
        for parent in block.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear | Conv1D)
    ]
    if not layers:
        raise ValueError(
            f"model.language_model.quantization: the blocks of {type(lm).__name__} have no linear layers; "
            "set it to none"
        )
    is_meta = next(lm.parameters()).is_meta
    before = None if is_meta else _probe(lm, gather)
    bytes_before = bytes_now = 0
    with partition():
        for parent, name, layer in layers:
            with gather(list(layer.parameters())):
                weight: Tensor = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
                bytes_before += weight.numel() * weight.element_size()
                quantized = QuantizedLinear(weight, layer.bias, method)
            setattr(parent, name, quantized)
            bytes_now += sum(
                math.prod(full_shape(parameter)) * parameter.element_size()
                for parameter in (quantized.codes, quantized.scales)
            )
    if before is None:
        return None
    try:
        now = _probe(lm, gather)
    except AttributeError as error:
        raise ValueError(
            f"model.language_model.quantization: {type(lm).__name__} reads the weights of a linear layer without "
            f"calling it ({error}); set it to none"
        ) from error
    relative = float((now - before).square().mean().sqrt() / before.square().mean().sqrt())
    same = float((now.argmax(-1) == before.argmax(-1)).float().mean())
    return QuantizationError(method, relative, same, before.shape[1], bytes_before, bytes_now)


@torch.no_grad()
def _probe(lm: Any, gather: Gather) -> Tensor:
    """Return the logits of the fixed sequence in float32; each module is whole only while it runs."""
    config = lm.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or _NUM_PROBED
    size = full_shape(lm.get_input_embeddings().weight)[0]
    device = next(lm.parameters()).device
    ids_BL = (torch.arange(min(_NUM_PROBED, positions), device=device) * _STRIDE % size)[None]
    was_training = lm.training
    lm.eval()
    with _gathered_as_they_run(lm, gather):
        logits: Tensor = lm(input_ids=ids_BL, use_cache=False).logits.float()
    lm.train(was_training)
    return logits


@contextmanager
def _gathered_as_they_run(module: nn.Module, gather: Gather) -> Iterator[None]:
    """Make the parameters of each submodule whole while it runs; DeepSpeed's engine does so later."""
    contexts: dict[int, ExitStack] = {}

    def enter(found: nn.Module, *_: Any) -> None:
        stack = contexts[id(found)] = ExitStack()
        stack.enter_context(gather(list(found.parameters(recurse=False))))

    def leave(found: nn.Module, *_: Any) -> None:
        contexts.pop(id(found)).close()

    handles = []
    for found in module.modules():
        if next(found.parameters(recurse=False), None) is not None:
            handles += [found.register_forward_pre_hook(enter), found.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
