"""Time the model's forward and DeepSpeed's collectives as parts of a clock, and count the bytes that a rank sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from trainer.benchmark.part_clock import GATHER, REDUCE, PartClock
from trainer.deepspeed_engine.engine import Engine
from trainer.deepspeed_engine.internals import replaced_backend
from trainer.tasks.contrastive.towers import ContrastiveTowers


@contextmanager
def parts_timed(engine: Engine, clock: PartClock) -> Iterator[TimedBackend]:
    """Make the model's forwards and the collectives parts of ``clock`` while the context is open.

    Yields:
        What counts the collectives of this rank and the bytes that it sends.
    """
    handles = []
    for name, module in timed_modules(engine.module).items():
        handles += [
            module.register_forward_pre_hook(partial(_enter, clock, name), prepend=True),
            module.register_forward_hook(partial(_leave, clock)),
        ]
    try:
        with replaced_backend(partial(TimedBackend, clock=clock)) as timed:
            yield timed
    finally:
        for handle in handles:
            handle.remove()


def timed_modules(model: Any) -> dict[str, nn.Module]:
    """Return the modules whose forwards are parts, by the name of the part; the whole model is the last one."""
    if isinstance(model, ContrastiveTowers):
        return {"vision": model.clip.visual, "text tower": model}
    return {"vision": model.vision_encoder, "resampler": model.resampler, "language model": model}


def _enter(clock: PartClock, name: str, module: nn.Module, arguments: Any) -> None:
    clock.enter(name)


def _leave(clock: PartClock, module: nn.Module, arguments: Any, output: Any) -> None:
    clock.leave()


@dataclass(frozen=True)
class _Collective:
    """Describe a collective as a ring.

    Attributes:
        part: Part of the clock that it belongs to.
        argument: Position and name of the argument that a rank puts in.
        passes: How often each rank sends the whole tensor but its own share.
        gathers: Whether the whole tensor is as many times the input as there are ranks, instead of the input.
    """

    part: str
    argument: tuple[int, str]
    passes: int = 1
    gathers: bool = False


_COLLECTIVES = {
    "all_gather": _Collective(GATHER, (1, "tensor"), gathers=True),
    "all_gather_into_tensor": _Collective(GATHER, (1, "input_tensor"), gathers=True),
    "all_gather_coalesced": _Collective(GATHER, (1, "input_tensors"), gathers=True),
    "broadcast": _Collective(GATHER, (0, "tensor")),
    "all_reduce": _Collective(REDUCE, (0, "tensor"), passes=2),
    "all_reduce_coalesced": _Collective(REDUCE, (0, "tensors"), passes=2),
    "reduce": _Collective(REDUCE, (0, "tensor")),
    "reduce_scatter": _Collective(REDUCE, (1, "input_list")),
    "reduce_scatter_tensor": _Collective(REDUCE, (1, "input_tensor")),
    "all_to_all_single": _Collective(REDUCE, (1, "input")),  # of quantized gradients, and of those of features
}


def sent_bytes(operation: str, input_bytes: int, ranks: int) -> float:
    """Return the bytes that a rank sends when a ring of ``ranks`` runs ``operation`` on ``input_bytes`` of each.

    The volumes are those of ring algorithms (Patarasuk and Yuan, 2009): 2 (n - 1) / n of the tensor for an all-reduce,
    half of that for a reduce-scatter or an all-gather.
    """
    kind = _COLLECTIVES[operation]
    whole = input_bytes * ranks if kind.gathers else input_bytes
    return kind.passes * whole * (ranks - 1) / ranks


class TimedBackend:
    """Wrap DeepSpeed's communication backend: time its collectives and the waits for them, and count them.

    Attributes:
        sent: Bytes that this rank sends, by part ("gather" or "reduce").
        collectives: Number of collectives, by part.
    """

    def __init__(self, backend: Any, clock: PartClock) -> None:
        self._backend, self._clock = backend, clock
        self.sent: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        return partial(self._collective, name, attribute) if name in _COLLECTIVES else attribute

    def _collective(self, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kind = _COLLECTIVES[name]
        with self._clock.part(kind.part):
            work = run(*args, **kwargs)
        position, keyword = kind.argument
        put_in = args[position] if position < len(args) else kwargs[keyword]
        tensors = put_in if isinstance(put_in, list | tuple) else [put_in]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # A fraction of a byte can only come from a tensor that the ranks do not divide.
        self.sent[kind.part] += round(sent_bytes(name, size, self._backend.get_world_size(kwargs.get("group"))))
        self.collectives[kind.part] += 1
        return work if work is None else _TimedWork(work, kind.part, self._clock)


class _TimedWork:
    """Wrap a running collective: waiting for it is time of its part."""

    def __init__(self, work: Any, part: str, clock: PartClock) -> None:
        self._work, self._part, self._clock = work, part, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Block until the collective is done."""
        with self._clock.part(self._part):
            return self._work.wait(*args, **kwargs)
