"""Count the memory that a micro-batch keeps for its backward, and the most that exists at once.

The model's own forward and backward run on fake tensors, which have shapes and no values. So nothing about language
models, attentions, types or ops is restated here. Counting takes a few seconds and no memory, for a model of any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.flamingo import Flamingo
from model.internals import FakeTensor, FakeTensorMode, TorchDispatchMode, list_tensors, storage_id
from model.parameters import full_shape
from model.tower_patches import PatchLayout

Linear = Callable[..., Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """Describe the shapes of one forward.

    Attributes:
        rows: Number of rows.
        tokens: Tokens of a row.
        media: Media of all rows.
        num_frames: Frames of a medium.
        grid: Rows and columns of a frame's patches where media keep their aspect; None for squares.
        packed: Whether a row holds several documents.
    """

    rows: int
    tokens: int
    media: int
    num_frames: int = 1
    grid: tuple[int, int] | None = None
    packed: bool = False


@dataclass(frozen=True)
class Activations:
    """Hold the memory of a micro-batch in bytes, without parameters and their gradients.

    Attributes:
        saved: Memory that the forward leaves for the backward.
        peak: Most that exists at any moment of forward and backward, ``saved`` included.
        blocks: Share of ``saved`` of each block of the language model with the cross-attention before it.
        vision: Most that exists until the vision tower is done.
        head: Share of ``saved`` of what follows the last block: the output embedding and the loss.
    """

    saved: int
    peak: int
    blocks: tuple[int, ...]
    vision: int
    head: int = 0


def count_activations(model: Flamingo, batch: MicroBatch, dtype: torch.dtype, linear: Linear = F.linear) -> Activations:
    """Count the memory of a micro-batch.

    Args:
        model: Model on any device, the meta device too, or partitioned. It is not changed. Its checkpointing counts.
        batch: Shapes of the micro-batch.
        dtype: Type of the floating-point parameters.
        linear: Function that computes projections; DeepSpeed replaces torch's while it partitions parameters.

    Raises:
        ValueError: The language model cannot run on tensors without values.
    """
    try:
        return _count(model, batch, dtype, linear)
    except Exception as error:  # a family's own code may fail in any way
        raise ValueError(
            f"the activations of {type(model.language_model.lm).__name__} cannot be counted ({type(error).__name__}: "
            f"{error}): leave out training.activation_memory_gib, and set training.activation_checkpointing instead"
        ) from error


def _count(model: Flamingo, batch: MicroBatch, dtype: torch.dtype, linear: Linear) -> Activations:
    device = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), replaced_linear(linear):
        state = {
            name: torch.empty(
                full_shape(p), dtype=dtype if p.is_floating_point() else p.dtype, device=device
            ).requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
        }
        state |= {
            name: torch.empty(buffer.shape, dtype=buffer.dtype, device=device) for name, buffer in model.named_buffers()
        }
        inputs = _make_inputs(model, batch)
        step = _Step(model)
        torch.func.functional_call(step, {f"model.{name}": tensor for name, tensor in state.items()}, (inputs,))
    return Activations(step.saved.total, step.peak, tuple(step.saved.blocks), step.vision, step.saved.head)


class _Step(nn.Module):
    """Run forward and backward inside one call, so that the backward finds the same parameters when it recomputes."""

    def __init__(self, model: Flamingo) -> None:
        super().__init__()
        self.model = model
        self.saved = SavedTensors(model)
        self.peak = self.vision = 0

    def forward(self, inputs: dict[str, Any]) -> None:
        drop_gradients(self.model)
        with AllocatedMemory() as memory:
            tower = self.model.vision_encoder
            hook = tower.register_forward_hook(lambda *_: setattr(self, "vision", memory.peak))
            with self.saved:
                loss = self.model(**inputs).loss
            hook.remove()
            loss.backward()
        self.peak = memory.peak


def drop_gradients(module: nn.Module) -> None:
    """Take each gradient of a module away as soon as it is made, as an engine does."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def replaced_linear(linear: Linear) -> Iterator[None]:
    """Put a function in the place of ``torch.nn.functional.linear`` while the context is open."""
    before = F.linear
    F.linear = linear
    try:
        yield
    finally:
        F.linear = before


def _make_inputs(model: Flamingo, batch: MicroBatch) -> dict[str, Any]:
    text = torch.zeros(batch.rows, batch.tokens, dtype=torch.int64)
    size, media = model.vision_encoder.image_size, max(1, batch.media)
    inputs: dict[str, Any] = {"input_ids": text, "labels": text.clone(), "media_index": text.clone()}
    if batch.packed:
        inputs |= {"position_ids": text.clone(), "document_offsets": text[:, 0].int(), "longest_document": batch.tokens}
    inputs["target_positions"] = text[:, 1:].flatten()  # as many as can have a label
    if batch.grid is None:
        return inputs | {"media": torch.zeros(media, batch.num_frames, 3, size, size, dtype=torch.uint8)}
    patch = model.vision_encoder.patch_size
    assert patch is not None, "a tower that takes squares only"
    grids = [(batch.num_frames, *batch.grid)] * media
    patches = media * batch.num_frames * batch.grid[0] * batch.grid[1]
    pixels = torch.zeros(patches, 3, patch, patch, dtype=torch.uint8)
    return inputs | {"media": pixels, "media_grids": grids, "patch_layout": PatchLayout.of(grids)}


class SavedTensors:
    """Count the memory that autograd keeps while this is open: each storage once, and no parameter.

    Real parameters are looked up whenever a tensor is saved. ZeRO-3 gives them another storage with each gathering, and
    their former storage may belong to an activation by then.

    Attributes:
        total: Bytes.
        blocks: Bytes that each block of the language model was the first to keep.
        head: Bytes that were first kept after the last block.
    """

    def __init__(self, model: Flamingo) -> None:
        """Count for the parameters and blocks of ``model``."""
        self.total = self.head = 0
        self.blocks = [0] * model.language_model.num_blocks
        self._model = model
        self._block: int | None = None
        self._seen: set[Any] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedTensors:
        parameters = list(self._model.parameters())
        self._seen = {storage_id(p) for p in parameters if isinstance(p, FakeTensor)}
        language_model = self._model.language_model
        self._handles = [
            handle
            for index, block in enumerate(language_model.decoder_blocks())
            for handle in (
                block.register_forward_pre_hook(lambda *_, index=index: self._enter(index)),
                block.register_forward_hook(lambda *_: self._enter(None)),
            )
        ]
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _enter(self, block: int | None) -> None:
        self._block, self.head = block, 0

    def _pack(self, tensor: Tensor) -> Tensor:
        identity = storage_id(tensor)
        if identity in self._seen or isinstance(tensor, nn.Parameter):
            return tensor
        if not isinstance(tensor, FakeTensor) and self._is_gathered(identity):
            return tensor
        self._seen.add(identity)
        size = tensor.untyped_storage().nbytes()
        self.total += size
        self.head += size
        if self._block is not None:
            self.blocks[self._block] += size
        return tensor

    def _is_gathered(self, identity: int) -> bool:
        return any(storage_id(parameter) == identity for parameter in self._model.parameters())


class AllocatedMemory(TorchDispatchMode):
    """Count the bytes of the tensors that are made while this is open, except memory that a kernel needs internally.

    Attributes:
        current: Bytes of the tensors that exist now.
        peak: Most bytes that existed at once.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """Start the count with ``existing`` tensors, which count as long as they stay."""
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in existing:
            self._count(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the op and count the storages that it made."""
        result = function(*args, **(kwargs or {}))
        given = {storage_id(tensor) for tensor in list_tensors((args, kwargs))}
        for tensor in list_tensors(result):
            if storage_id(tensor) not in given:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        identity = storage_id(tensor)
        if identity not in self._sizes:
            storage = tensor.untyped_storage()
            self._sizes[identity] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, identity)

    def _free(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
