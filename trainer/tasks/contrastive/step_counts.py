"""Count what a contrastive step takes: memory of the towers and of the loss, and floating-point operations.

The towers and the loss run on fake tensors, which have shapes and no values. Counting takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.activations import AllocatedMemory, Linear, drop_gradients, replaced_linear
from model.internals import FakeTensorMode
from model.parameters import full_shape
from trainer.config.contrastive_config import ContrastiveLossConfig
from trainer.tasks.contrastive.losses import Features, chunk_gradients, surrogate
from trainer.tasks.contrastive.towers import ContrastiveTowers


@dataclass(frozen=True)
class InputShape:
    """Describe the inputs of the towers.

    Attributes:
        image_size: Side of an image in pixels.
        context_length: Tokens of a caption.
    """

    image_size: int
    context_length: int


@dataclass(frozen=True)
class TowerMemory:
    """Hold the memory of a micro-batch in bytes, without parameters and their gradients.

    Attributes:
        without_graph: Most that exists in a forward without a graph.
        saved: What a forward leaves for the backward, features included.
        peak: Most that exists at any moment of forward and backward, ``saved`` included.
        image_tower: Most that exists until the image tower is done.
    """

    without_graph: int
    saved: int
    peak: int
    image_tower: int


def count_memory(
    towers: ContrastiveTowers, shape: InputShape, rows: int, dtype: torch.dtype, linear: Linear = F.linear
) -> TowerMemory:
    """Count the memory of a micro-batch.

    Args:
        towers: The towers on any device, the meta device too. They are not changed.
        shape: Shapes of the inputs.
        rows: Pairs of the micro-batch.
        dtype: Type of the floating-point parameters.
        linear: Function that computes projections; DeepSpeed replaces torch's while it partitions parameters.
    """
    first, second = _Forward(towers), _ForwardAndBackward(towers)
    with FakeTensorMode(allow_non_fake_inputs=True), replaced_linear(linear):
        with torch.no_grad():
            _call(first, towers, shape, rows, dtype)
        _call(second, towers, shape, rows, dtype)
    return TowerMemory(first.peak, second.saved, second.peak, second.image_tower)


def count_forward_flops(towers: ContrastiveTowers, shape: InputShape) -> int:
    """Return the operations that a forward of both towers takes for one pair. A backward takes twice as many."""
    forward = _Forward(towers)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        _call(forward, towers, shape, 1, torch.float32)
    return int(counter.get_total_flops())


def count_loss_memory(
    rows: int, columns: int, dim: int, config: ContrastiveLossConfig, *, biased: bool, masked: bool
) -> int:
    """Return the most bytes that exist while a chunk of logits and its gradients are computed.

    Args:
        rows: Pairs of this process in the problem.
        columns: Pairs of all processes.
        dim: Length of a feature.
        config: Settings of the loss.
        biased: Whether the logits have a bias.
        masked: Whether equal captions are left out.
    """
    chunk = min(rows, config.rows_per_chunk)
    with FakeTensorMode():
        scale = torch.ones(1)
        bias = torch.ones(1) if biased else None
        own = Features(torch.empty(chunk, dim), torch.empty(chunk, dim), scale, bias).leaves()
        images, texts = (torch.empty(columns, dim, requires_grad=True) for _ in range(2))
        groups = torch.zeros(columns, dtype=torch.int64) if masked else None
        with AllocatedMemory() as memory:
            chunk_gradients(own, [images, texts], groups, 0, config, 1.0)
    return memory.peak


def _call(step: nn.Module, towers: ContrastiveTowers, shape: InputShape, rows: int, dtype: torch.dtype) -> None:
    """Call a step with fake tensors in place of the towers' parameters and buffers."""
    state = {
        f"towers.{name}": torch.empty(full_shape(p), dtype=dtype).requires_grad_(p.requires_grad)
        for name, p in towers.named_parameters()
    }
    state |= {
        f"towers.{name}": torch.empty(buffer.shape, dtype=dtype if buffer.is_floating_point() else buffer.dtype)
        for name, buffer in towers.named_buffers()
    }
    media = torch.zeros(rows, 1, 3, shape.image_size, shape.image_size, dtype=torch.uint8)
    captions = torch.zeros(rows, shape.context_length, dtype=torch.int64)
    torch.func.functional_call(step, state, (captions, media))


class _Forward(nn.Module):
    """Run a forward, and count its memory."""

    def __init__(self, towers: ContrastiveTowers) -> None:
        super().__init__()
        self.towers = towers
        self.peak = 0

    def forward(self, captions: Tensor, media: Tensor) -> None:
        with AllocatedMemory() as memory:
            self.towers(captions, media)
        self.peak = memory.peak


class _ForwardAndBackward(nn.Module):
    """Run forward and backward inside one call, and count their memory."""

    def __init__(self, towers: ContrastiveTowers) -> None:
        super().__init__()
        self.towers = towers
        self.saved = self.peak = self.image_tower = 0

    def forward(self, captions: Tensor, media: Tensor) -> None:
        drop_gradients(self.towers)
        with AllocatedMemory() as memory:
            note: Callable[..., None] = lambda *_: setattr(self, "image_tower", memory.peak)  # noqa: E731
            hook = self.towers.clip.visual.register_forward_hook(note)
            features = Features(*self.towers(captions, media))
            hook.remove()
            self.saved = memory.current
            gradients = Features(*(torch.empty_like(part, dtype=torch.float32) for part in features.tensors()))
            before = memory.current - self.saved  # gradients that the loss has made; they count there
            surrogate(features, gradients, with_scale=True).backward()
        self.peak = memory.peak - before
