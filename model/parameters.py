"""Tell trained from frozen parameters, and prove that the frozen ones have not changed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
Partition = Callable[[], AbstractContextManager[Any]]
Redraw = Callable[[nn.Module, Callable[[], nn.Module]], None]


def no_gather(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Do nothing: the ``gather`` of parameters that are not partitioned."""
    return nullcontext()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that never change, by name, in the model's order; tied ones appear once."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, also while ZeRO-3 has it partitioned and its own shape is [0]."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def num_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Count the weights of parameters, also while they are partitioned; a byte of uint8 holds two codes of 4 bits."""
    return sum(math.prod(full_shape(one)) * (2 if one.dtype == torch.uint8 else 1) for one in parameters)


def frozen_digests(model: nn.Module, gather: Gather = no_gather) -> dict[str, str]:
    """Return the sha256 of every frozen parameter and of every persistent buffer that training leaves alone, by name.

    A digest covers name, type, shape and bytes, and is the same whether or not parameters are partitioned. Under ZeRO-3
    every rank has to call this, because each gather is a collective. One parameter is whole at a time.

    Args:
        model: Any module.
        gather: Context that makes partitioned parameters whole.
    """
    digests = {}
    for name, parameter in frozen_parameters(model).items():
        with gather([parameter]):
            digests[name] = _digest(name, parameter.detach())
    for name, buffer in _frozen_buffers(model):
        digests[name] = _digest(name, buffer)
    return digests


def frozen_fingerprint(model: nn.Module, gather: Gather = no_gather) -> str:
    """Return one sha256 over all of ``frozen_digests``."""
    return combine_digests(frozen_digests(model, gather))


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return one sha256 over digests, whatever their order."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def explain_difference(expected: Mapping[str, str], found: Mapping[str, str], most: int = 5) -> str:
    """Name the frozen tensors that differ, up to ``most`` of a kind; return "" when none does."""
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "different": [name for name in expected if name in found and expected[name] != found[name]],
    }
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            parts.append(f"{len(names)} {kind}: {', '.join(names[:most])}{more}")
    return "; ".join(parts)


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of modules with a trained parameter: batch norm's statistics change with it."""
    trained = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for name, _ in module.named_buffers(recurse=False)
    }
    persistent = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in trained and name in persistent}


def _frozen_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    persistent, trained = model.state_dict().keys(), trained_buffers(model)
    for name, buffer in model.named_buffers():
        if name in persistent and name not in trained:
            yield name, buffer


def _digest(name: str, tensor: Tensor) -> str:
    header = f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()
    digest = hashlib.sha256(header)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
