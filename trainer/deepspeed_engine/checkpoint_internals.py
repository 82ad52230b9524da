"""Reach into the parts of DeepSpeed that write and read checkpoints.

Every function says why it is needed and which upstream issue would make it unnecessary. All were checked with
DeepSpeed 0.19.8. ``tests/deepspeed_engine/test_internals.py`` fails when a name disappears or changes its signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils.tensor_fragment import map_to_flat_opt_states
from torch import Tensor

Write = Callable[[Any, Path], None]


def write_checkpoints_with(engine: Any, write: Write) -> None:
    """Make ``engine.save_checkpoint`` pass each file's content and path to ``write`` instead of writing the file.

    Reason: DeepSpeed writes with ``torch.save`` and makes training wait; its JSON offers a choice among its own writers
    only.
    Upstream issue: DeepSpeed #2972 discusses writers from outside.
    """
    engine.checkpoint_engine = _DelegatingCheckpointEngine(write)


class _DelegatingCheckpointEngine(TorchCheckpointEngine):
    """Read as DeepSpeed does, and let a function write."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def save(self, state_dict: Any, path: str) -> None:
        """Pass one file's content and path on."""
        self._write(state_dict, Path(path))


def saved_tensor_sizes(engine: Any) -> list[tuple[torch.dtype, int]]:
    """Return type and length of the optimizer tensors in this rank's checkpoint file: weights and two moments each.

    Reason: memory for the copy is prepared before the first save, and DeepSpeed has no public list of what it saves.
    Upstream issue: none found.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        weights = moments = zero.fp32_partitioned_groups_flat
    else:
        moments = zero.single_partition_of_fp32_groups
        weights = zero._get_groups_without_padding(moments)  # the moments are saved with their padding
    return [(tensor.dtype, tensor.numel()) for tensor in (*weights, *moments, *moments)]


@contextmanager
def own_settings_kept(engine: Any) -> Iterator[None]:
    """Let ``engine.load_checkpoint`` load the state of the optimizer, but none of its settings.

    Reason: DeepSpeed and torch take the hyperparameters of every parameter group from the checkpoint; ZeRO-1 and 2 also
    take the norm for clipping. The run's own settings, which config.yaml shows, would silently not hold.
    Upstream issue: none found.
    """
    zero = engine.optimizer
    state = ("params", "step")  # apex counts its steps there
    settings = [{key: value for key, value in group.items() if key not in state} for group in zero.param_groups]
    clip_grad = zero.clip_grad
    yield
    zero.clip_grad = clip_grad
    for group, own in zip(zero.param_groups, settings, strict=True):
        group.update(own)


def load_universal_checkpoint(engine: Any, folder: Path, tag: str) -> Path | None:
    """Read weights and optimizer from DeepSpeed's universal format; a collective.

    Reasons, all without an upstream issue that was found (#7585 is about the conversion, not about loading):

    - The JSON selects the format before the start (``checkpoint.load_universal``), but the checkpoint that is found
      decides it.
    - Under ZeRO-1 and 2, DeepSpeed's loader fails on some ranks (see ``_load_partitions``).
    - Under ZeRO-3, DeepSpeed gives all parameters one step tensor, which each of them would then advance.

    Returns:
        The file with the model's states, or None if DeepSpeed found no checkpoint.
    """
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.load_hp_checkpoint_state_from_checkpoint_dir = partial(_load_partitions, engine.optimizer)
    engine._config.load_universal_checkpoint = True
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    if path is None:
        return None
    for parameter, state in engine.optimizer.optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)
    return Path(path)


def _load_partitions(zero_optimizer: Any, groups_name: str, folder: str) -> None:
    """Load this rank's part of the optimizer under ZeRO-1 and 2, in place of DeepSpeed's method.

    Reason: ``load_hp_checkpoint_state_from_checkpoint_dir`` raises IndexError on a rank whose part of a group is only
    padding. That happens with small groups (the gates) on many ranks. It also refuses what ZeRO-3 wrote, for want of
    the state of a loss scaler and the number of DeepSpeed's version.
    Upstream issue: none found.
    """
    zero = Path(folder) / "zero"
    base_optimizer = zero_optimizer.optimizer
    parameter_groups = zip(base_optimizer.param_groups, getattr(zero_optimizer, groups_name), strict=True)
    for group, parameters in parameter_groups:
        local = [parameter for parameter in parameters if parameter._hp_mapping is not None]
        names = [zero_optimizer.param_names[parameter] for parameter in local]
        steps = [
            parameter.load_hp_checkpoint_state(str(zero / name), 0, 1)
            for parameter, name in zip(local, names, strict=True)
        ]
        if local:
            [flat] = group["params"]
            keys = {key for parameter in local for key in parameter._hp_mapping.get_optim_state_keys()}
            map_to_flat_opt_states(flat, parameters, base_optimizer.state, keys)
            base_optimizer.state[flat]["step"] = steps[0]
