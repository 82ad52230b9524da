"""Keep the linear layers of a frozen language model in 8 bits.

A row of a weight is cut into blocks of ``BLOCK`` numbers. Each block keeps int8 codes and one scale, so that its
largest number becomes 127. A forward turns the codes back into the type of the activations and multiplies as before.
The backward does so once more, for the gradient of the input.

The codes are frozen parameters. So ZeRO-3 partitions, gathers and offloads them as it does others, and their digest is
part of ``frozen_digests``. torch's own int8 product (``torch._weight_int8pack_mm``) is private, has one scale a row and
no derivative. With hundreds of tokens in a micro-batch, turning codes back takes little beside the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from model.parameters import Gather, full_shape, no_gather

BLOCK = 128  # numbers of a row that share a scale
_LARGEST = 127
_NUM_PROBED = 64  # tokens of the probe, or as many as the language model has positions for
_STRIDE = 7919  # a prime: the ids of the probe spread over the vocabulary


@dataclass(frozen=True)
class QuantizationError:
    """Compare the logits of a quantized language model to those before, on a fixed sequence of token ids.

    Attributes:
        relative: Root mean square of the difference, divided by that of the logits before.
        same_choice: Share of the positions whose most likely token is the same.
        num_tokens: Tokens of the sequence.
        bytes_before: Bytes of the quantized weights before.
        bytes_now: Bytes of their codes and scales.
    """

    relative: float
    same_choice: float
    num_tokens: int
    bytes_before: int
    bytes_now: int

    def __str__(self) -> str:
        """Describe the error and the bytes in one line."""
        return (
            f"language model in int8: logits differ by {self.relative:.2%} (root mean square, {self.num_tokens} "
            f"probed tokens), the most likely token is the same at {self.same_choice:.0%} of them; its linear layers "
            f"take {self.bytes_now / 2**20:.4g} MiB instead of {self.bytes_before / 2**20:.4g} MiB"
        )


class QuantizedLinear(nn.Module):
    """Compute a linear layer whose frozen weight is kept as int8 codes.

    Attributes:
        in_features: Size of the input.
        out_features: Size of the output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantize a weight, and copy the bias."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        codes, scales = quantize(weight)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """Return ``input @ weight.T + bias``, [..., outputs]."""
        output: Tensor = _QuantizedProduct.apply(input, self.codes, self.scales)
        return output if self.bias is None else output + self.bias


class _QuantizedProduct(torch.autograd.Function):
    """Multiply by a quantized weight. It keeps the parameters alone, which ZeRO-3 may partition until the backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, codes: Tensor, scales: Tensor) -> Tensor:  # noqa: A002
        ctx.save_for_backward(codes, scales)
        return F.linear(input, dequantize(codes, scales, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        [gradient] = gradients
        return gradient @ dequantize(codes, scales, gradient.dtype), None, None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [outputs, inputs] as int8 codes, and a scale for each block of each row, flat, in its type."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = F.pad(weight.detach(), (0, blocks * BLOCK - columns)).view(rows, blocks, BLOCK)
    scales = (padded.abs().amax(-1, keepdim=True).float() / _LARGEST).to(weight.dtype)
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    codes = (padded.float() / divisors).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return codes.view(rows, -1)[:, :columns].contiguous(), scales.flatten()


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs] that ``quantize`` stored."""
    rows, columns = codes.shape
    if columns % BLOCK == 0:
        return (codes.view(rows, -1, BLOCK).to(dtype) * scales.to(dtype).view(rows, -1, 1)).view(rows, columns)
    by_column = scales.to(dtype).view(rows, -1).repeat_interleave(BLOCK, 1)[:, :columns]
    return codes.to(dtype) * by_column


def quantize_language_model(
    lm: Any,
    blocks: Iterable[nn.Module],
    gather: Gather = no_gather,
    partition: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> QuantizationError | None:
    """Replace the linear layers of a causal LM's blocks by quantized ones, in place.

    Args:
        lm: Hugging Face's causal LM, whose parameters may be partitioned.
        blocks: Its decoder blocks. The tables of embeddings outside them keep their type.
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
                quantized = QuantizedLinear(weight, layer.bias)
            setattr(parent, name, quantized)
            bytes_now += sum(
                _numel(parameter) * parameter.element_size() for parameter in (quantized.codes, quantized.scales)
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
    return QuantizationError(relative, same, before.shape[1], bytes_before, bytes_now)


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


def _numel(parameter: nn.Parameter) -> int:
    return torch.Size(full_shape(parameter)).numel()
