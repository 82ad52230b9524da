"""Where the time of an update goes, and what it sends: a clock of parts, and DeepSpeed's collectives as two of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.deepspeed_engine.engine import Engine
from trainer.runtime.distributed import World

OUTERMOST, GATHER, REDUCE = "data wait", "gather", "reduce"
PARTS = (OUTERMOST, "vision", "resampler", "language model", "backward", GATHER, REDUCE, "optimizer")


class PartClock:
    """Gives each moment to the innermost part that is open then, so that parts add up to the whole, exactly.

    now: nanoseconds. outermost: the part while no other is open. Parts may be opened and closed on any thread, but only
    one after the other, as in autograd's.
    """

    def __init__(self, now: Callable[[], int], outermost: str) -> None:
        self._now = now
        self._open = [outermost]
        self._spent: Counter[str] = Counter()
        self._since = now()

    def enter(self, name: str) -> None:
        """Open a part in the one that is open."""
        self._pass()
        self._open.append(name)

    def leave(self) -> None:
        """Close the innermost part."""
        self._pass()
        self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that is open as long as this is."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def lap(self) -> Counter[str]:
        """Nanoseconds by part since the last lap, or the beginning."""
        self._pass()
        spent, self._spent = self._spent, Counter()
        return spent

    def _pass(self) -> None:
        now = self._now()
        self._spent[self._open[-1]] += now - self._since
        self._since = now


def device_clock(world: World) -> Callable[[], int]:
    """The wall clock in nanoseconds; on a GPU, after everything that was asked of it."""

    def synchronized() -> int:
        torch.cuda.synchronize(world.device)
        return time.perf_counter_ns()

    return synchronized if world.device.type == "cuda" else time.perf_counter_ns


@contextmanager
def parts_timed(engine: Engine, clock: PartClock) -> Iterator[Counter[str]]:
    """While this is open, the forwards of the model and the collectives are parts of ``clock``.

    Yields bytes that this rank sends, by the part that sends them.
    """
    import deepspeed.comm.comm as deepspeed_comm

    model: Any = engine.module
    handles = []
    for name, module in (("vision", model.vision_encoder), ("resampler", model.resampler), ("language model", model)):
        handles += [
            module.register_forward_pre_hook(partial(_enter, clock, name), prepend=True),
            module.register_forward_hook(partial(_leave, clock)),
        ]
    backend = deepspeed_comm.cdb
    deepspeed_comm.cdb = timed = _TimedBackend(backend, clock)
    try:
        yield timed.sent
    finally:
        deepspeed_comm.cdb = backend
        for handle in handles:
            handle.remove()


def _enter(clock: PartClock, name: str, module: nn.Module, arguments: Any) -> None:
    clock.enter(name)


def _leave(clock: PartClock, module: nn.Module, arguments: Any, output: Any) -> None:
    clock.leave()


@dataclass(frozen=True)
class _Collective:
    """argument: position and name of what a rank puts in. passes: how often, in a ring, each rank sends the share of
    all others in what ``whole`` says is the whole: the tensor, or as many of it as there are ranks."""

    part: str
    argument: tuple[int, str]
    passes: int = 1
    whole_is_gathered: bool = False


_COLLECTIVES = {
    "all_gather": _Collective(GATHER, (1, "tensor"), whole_is_gathered=True),
    "all_gather_into_tensor": _Collective(GATHER, (1, "input_tensor"), whole_is_gathered=True),
    "all_gather_coalesced": _Collective(GATHER, (1, "input_tensors"), whole_is_gathered=True),
    "broadcast": _Collective(GATHER, (0, "tensor")),
    "all_reduce": _Collective(REDUCE, (0, "tensor"), passes=2),
    "all_reduce_coalesced": _Collective(REDUCE, (0, "tensors"), passes=2),
    "reduce": _Collective(REDUCE, (0, "tensor")),
    "reduce_scatter": _Collective(REDUCE, (1, "input_list")),
    "reduce_scatter_tensor": _Collective(REDUCE, (1, "input_tensor")),
    "all_to_all_single": _Collective(REDUCE, (1, "input")),  # of quantized gradients
}


def sent_bytes(operation: str, put_in: int, ranks: int) -> float:
    """What a rank sends in a ring of ``ranks`` that runs ``operation``, having put in that many bytes."""
    kind = _COLLECTIVES[operation]
    whole = put_in * ranks if kind.whole_is_gathered else put_in
    return kind.passes * whole * (ranks - 1) / ranks


class _TimedBackend:
    """DeepSpeed's backend, with its collectives, and the waits for them, as parts of a clock, and what they send."""

    def __init__(self, backend: Any, clock: PartClock) -> None:
        self._backend, self._clock = backend, clock
        self.sent: Counter[str] = Counter()

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
        # A whole number of bytes but for a tensor that the ranks do not divide.
        self.sent[kind.part] += round(sent_bytes(name, size, self._backend.get_world_size(kwargs.get("group"))))
        return work if work is None else _TimedWork(work, kind.part, self._clock)


class _TimedWork:
    """A collective that is under way; waiting for it is time of its part."""

    def __init__(self, work: Any, part: str, clock: PartClock) -> None:
        self._work, self._part, self._clock = work, part, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Block until it is done."""
        with self._clock.part(self._part):
            return self._work.wait(*args, **kwargs)
