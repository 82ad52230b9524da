"""Run code on an accelerator that does not exist, and record where the host would have to wait for it.

The accelerator is torch's device for backends from outside (PrivateUse1) under fake tensors, which have shapes, types
and devices and no values. A tensor on the wrong device raises, and so does reading a value. Fake tensors of the device
"cuda" would not do: their backward asks the driver for streams.

torch registers such a backend once in a process and for good, so all of this runs in a process of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.utils import import_utils

from model import ops
from model.internals import FakeTensorMode, TorchDispatchMode
from model.ops import cuda_limits, dispatch, library

NAME = "fakegpu"
NEWLINE = "\n"
# Ops that launch no kernel: they give another view of a tensor, or memory that nothing has been written to.
_NO_KERNEL = (
    "view,_unsafe_view,t,transpose,slice,select,expand,unsqueeze,squeeze,detach,alias,permute,unbind,split,"
    "split_with_sizes,chunk,narrow,as_strided,_reshape_alias,unfold,empty,empty_like,new_empty,empty_strided,lift_fresh,"
    "diagonal,_conj,sym_size,is_same_size"
).split(",")


def register() -> torch.device:
    """Register the accelerator in this process, and let the fused ops run on it as on a GPU."""
    _setup_privateuseone_for_python_backend(NAME)
    library.load_errors()
    use_fused = dispatch.use_fused

    def use_fused_here(op: str, q: Tensor, backend: str | None) -> bool:
        if q.device.type != NAME:
            return use_fused(op, q, backend)
        return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in cuda_limits.HEAD_DIMS

    vars(ops)["use_fused"] = use_fused_here
    import_utils.is_fake_tensor = lambda tensor: False  # transformers reads no value of tensors that it takes for fake
    return torch.device(NAME, 0)


@dataclass
class Watch:
    """Hold what a run did on the accelerator.

    Attributes:
        waits: Where the host waits for the accelerator: a value is read, or a copy between devices is not asynchronous.
        failure: Exception that ended the run, with its place; a tensor on the wrong device raises one.
        kernels: Number of calls of ops that launch a kernel, by op.
        hooked: Modules with parameters that ZeRO-3 gathers one by one.
    """

    waits: list[str] = field(default_factory=list)
    failure: str | None = None
    kernels: Counter[str] = field(default_factory=Counter)
    hooked: int = 0


@contextmanager
def watching(answers: Sequence[Any] = ()) -> Iterator[Watch]:
    """Record what happens on the accelerator in this context; an exception ends it and is recorded.

    Args:
        answers: Values that are read, one after the other; reading one more is an exception.
    """
    watch, pinned = Watch(), dict[int, Tensor]()
    make_tensor = torch.tensor

    def pin(tensor: Tensor) -> Tensor:
        return pinned.setdefault(id(tensor), tensor)

    def make_tensor_in_two_steps(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """Copy Python's numbers to the device, which torch does out of sight of a dispatch mode."""
        tensor = make_tensor(data, *args, **kwargs)
        return tensor if device is None else tensor.to(device)

    try:
        with mock.patch.object(Tensor, "pin_memory", pin), mock.patch.object(torch, "tensor", make_tensor_in_two_steps):
            with _Recorder(watch, pinned, list(answers)):
                yield watch
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        watch.waits.append(f"a value is read ({error.func}) {_place(error.__traceback__)}")
    except Exception as error:  # noqa: BLE001  whatever it is, the test reports it
        watch.failure = f"{type(error).__name__}: {str(error).partition(NEWLINE)[0]} {_place(error.__traceback__)}"


class _Recorder(TorchDispatchMode):
    def __init__(self, watch: Watch, pinned: dict[int, Tensor], answers: list[Any]) -> None:
        super().__init__()
        self._watch, self._pinned, self._answers = watch, pinned, answers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self._answers and name == "_local_scalar_dense":
            self._wait("a value is read")
            return self._answers.pop(0)
        if name == "_to_copy" and kwargs.get("device", args[0].device).type == NAME:
            args[0].constant = None  # a small tensor of numbers has values, which would be copied to the accelerator
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs, result)
        elif name in ("index", "index_put", "index_put_"):
            if args[0].device.type == NAME and any(i is not None and i.device.type == "cpu" for i in args[1]):
                self._wait(f"{name} copies its indices from the CPU")
        if isinstance(result, Tensor) and result.device.type == NAME and name not in _NO_KERNEL:
            self._watch.kernels[name] += 1
        elif isinstance(result, tuple | list) and name not in _NO_KERNEL:
            self._watch.kernels[name] += any(isinstance(x, Tensor) and x.device.type == NAME for x in result)
        return result

    def _copy(self, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        source = args[0] if name == "_to_copy" else args[1]
        if source.device.type == result.device.type or (name == "copy_" and source.ndim == 0):
            return
        asynchronous = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if source.device.type == NAME:
            self._wait(f"copy of {tuple(source.shape)} to the CPU")
        elif not asynchronous:
            self._wait(f"blocking copy of {tuple(source.shape)}")
        elif id(source) not in self._pinned:
            self._wait(f"copy of {tuple(source.shape)} that is not pinned")

    def _wait(self, reason: str) -> None:
        self._watch.waits.append(f"{reason} {_place()}")


def _place(trace: Any = None) -> str:
    """Return where it happened outside torch, innermost first."""
    stack = traceback.extract_tb(trace) if trace is not None else traceback.extract_stack()
    outside = [frame for frame in stack if "site-packages/torch/" not in frame.filename and frame.filename != __file__]
    return "at " + " < ".join(
        f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}" for frame in outside[:-5:-1]
    )


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Make every new tensor a fake one."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def place(module: nn.Module, parameters: torch.device, buffers: torch.device) -> None:
    """Replace the tensors of a module on the meta device by fake ones on two devices; tied parameters stay tied."""
    placed: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in placed:
                data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameters)
                placed[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
            setattr(owner, name, placed[id(parameter)])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=buffers))
