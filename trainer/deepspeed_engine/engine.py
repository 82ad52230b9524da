"""The only place that drives DeepSpeed: build, forward, backward, step, was the step applied, save and load.

DeepSpeed averages gradients over ranks and would divide by the number of micro-steps; both are undone here, because the
loss is normalized over the global batch by the loop. What arrives at the optimizer is therefore exactly
``sum over sources of weight * (summed loss / normalizer)``, clipped once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import groups as process_groups
from deepspeed.utils.tensor_fragment import map_to_flat_opt_states
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from trainer.config.run_config import OptimizerConfig
from trainer.deepspeed_engine import partitioned_linear
from trainer.deepspeed_engine.optimizer import build_optimizer, parameter_groups, set_learning_rate
from trainer.runtime.cpu_matmul import use_onednn
from trainer.runtime.distributed import World

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
Partition = Callable[[], AbstractContextManager[Any]]
Write = Callable[[Any, Path], None]


@dataclass(frozen=True)
class Placement:
    """How a model is built so that no process ever holds all of it.

    gather: context in which the given (possibly partitioned) parameters can be read whole.
    partition: context in which new modules are partitioned as they are made.
    """

    gather: Gather
    partition: Partition


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[Placement]:
    """While this is open, Hugging Face models are partitioned as they load if ``settings`` ask for ZeRO-3."""
    if settings["zero_optimization"]["stage"] < 3:
        yield Placement(gather=lambda parameters: nullcontext(), partition=nullcontext)
        return
    partitioned_linear.install()
    # transformers looks for a living HfDeepSpeedConfig, so this reference is what switches partitioning on.
    alive = HfDeepSpeedConfig(settings)
    try:
        with _one_hpz_group():
            yield Placement(gathered_parameters, lambda: deepspeed.zero.Init(config_dict_or_path=settings))
    finally:
        del alive
        _forget_hugging_face_config()


def _forget_hugging_face_config() -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


@contextmanager
def _one_hpz_group() -> Iterator[None]:
    """Every ``zero.Init`` makes hpZ's group of processes, and fails if there is one; a model takes several of them."""
    create = process_groups._create_zero_param_parallel_group

    def create_once(size: int) -> None:
        if process_groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    process_groups._create_zero_param_parallel_group = create_once
    try:
        yield
    finally:
        process_groups._create_zero_param_parallel_group = create


def gathered_parameters(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Read parameters whole, whether or not ZeRO-3 partitioned them; a collective when it did."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext()


@dataclass(frozen=True)
class StepResult:
    """applied: False when a non-finite gradient on any rank made all ranks skip. grad_norm: before clipping."""

    applied: bool
    grad_norm: float


class Engine:
    """A module under DeepSpeed. ``module(**inputs)`` returns an object with ``loss``: the sum over what is trained."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, settings: dict[str, Any], world: World) -> None:
        self.world = world
        if world.device.type == "cpu":
            use_onednn()
        partitioned_linear.install()
        self._learning_rate = optimizer.lr
        groups = parameter_groups(module.named_parameters(), optimizer)
        if not groups:
            raise ValueError("nothing to train: every parameter of the model is frozen")
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(groups, optimizer), config=settings
        )
        # Rank 0 would copy DeepSpeed's scripts into every checkpoint, and if it could not, leave the others waiting.
        self._deepspeed._copy_recovery_script = lambda path: None

    @property
    def module(self) -> nn.Module:
        """The module as it was given; its parameters may be partitioned."""
        module: nn.Module = self._deepspeed.module
        return module

    def forward_backward(self, inputs: dict[str, Tensor], scale: float) -> Tensor:
        """One micro-step: accumulates the gradient of ``scale * loss`` summed over all ranks.

        Returns the detached, unscaled loss of this rank (a scalar on the device: reading it waits for the device).
        """
        loss: Tensor = self._deepspeed(**inputs).loss
        # DeepSpeed averages over ranks; the loop's normalizer already counts the global batch.
        self._deepspeed.backward(loss * (scale * self.world.size), scale_wrt_gas=False)
        detached = loss.detach()
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-step; the optimizer waits for the last one
        return detached

    def step(self, learning_rate_factor: float) -> StepResult:
        """Clip and apply the accumulated gradient. Every rank gives the same answer."""
        set_learning_rate(self._optimizer.param_groups, self._learning_rate * learning_rate_factor)
        assert self._deepspeed.is_gradient_accumulation_boundary(), "the loop runs the same micro-steps every update"
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm()
        return StepResult(bool(self._deepspeed.was_step_applied()), float("nan") if norm is None else float(norm))

    def shard_sizes(self) -> list[tuple[torch.dtype, int]]:
        """Type and length of this rank's optimizer tensors that ``save`` gives: weights and their two moments."""
        zero = self._deepspeed.optimizer
        if self._deepspeed.zero_optimization_stage() == 3:
            weights = moments = zero.fp32_partitioned_groups_flat
        else:
            moments = zero.single_partition_of_fp32_groups
            weights = zero._get_groups_without_padding(moments)  # cut off of these alone
        return [(tensor.dtype, tensor.numel()) for tensor in (*weights, *moments, *moments)]

    def save(self, folder: Path, tag: str, write: Write) -> None:
        """Give this rank's shards of trainable weights and optimizer to ``write``, with their paths in ``folder/tag``.

        A collective. write: must not keep the tensors after it returns; the next update changes them.
        """
        self._deepspeed.checkpoint_engine = _HandOver(write)
        self._deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> None:
        """Read what ``save`` gave, at the same world size; a collective.

        Raises: RuntimeError when DeepSpeed finds nothing to load.
        """
        path, _ = self._deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {folder / tag}")

    def load_universal(self, folder: Path, tag: str) -> None:
        """Read a checkpoint in DeepSpeed's universal format, whatever world size wrote it; a collective.

        Raises: RuntimeError when DeepSpeed finds nothing to load.
        """
        engine, groups = self._deepspeed, self._optimizer.param_groups
        hyperparameters = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        if engine.zero_optimization_stage() < 3:
            load = partial(_load_partitions, engine.optimizer)
            engine.optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load
        engine._config.load_universal_checkpoint = True
        try:
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
        finally:
            engine._config.load_universal_checkpoint = False
        if path is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {folder / tag}")
        # ZeRO-3 gives every group the first one's hyperparameters and one shared step, which each would then advance.
        for group, own in zip(groups, hyperparameters, strict=True):
            group.update(own)
        for parameter, state in engine.optimizer.optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device, copy=True)
        self._load_buffers(Path(path))

    def _load_buffers(self, model_states: Path) -> None:
        """What trains without a gradient (batch norm's statistics, for one), which DeepSpeed leaves out."""
        saved = torch.load(model_states, map_location="cpu", weights_only=False)["module"]
        for name, buffer in self.module.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])


class _HandOver(TorchCheckpointEngine):
    """Lets somebody else write what DeepSpeed would write; reads as DeepSpeed does."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def save(self, state_dict: Any, path: str) -> None:
        """Hand over one file's content."""
        self._write(state_dict, Path(path))


def _load_partitions(optimizer: Any, groups_name: str, folder: str) -> None:
    """This rank's part of the optimizer from the universal format, under ZeRO-1 and 2.

    DeepSpeed's own method of that name ends with an IndexError on a rank that has nothing but padding of a group, as
    happens with small groups (the gates) on many ranks.
    """
    zero = Path(folder) / "zero"
    common = torch.load(zero / "optimizer_state.pt", map_location="cpu", weights_only=False)
    optimizer._load_global_state(common)
    parameter_groups = zip(optimizer.optimizer.param_groups, getattr(optimizer, groups_name), strict=True)
    for group, parameters in parameter_groups:
        mine = [parameter for parameter in parameters if parameter._hp_mapping is not None]
        steps = [
            parameter.load_hp_checkpoint_state(str(zero / optimizer.param_names[parameter]), 0, 1) for parameter in mine
        ]
        if mine:
            [flat] = group["params"]
            keys = {key for parameter in mine for key in parameter._hp_mapping.get_optim_state_keys()}
            map_to_flat_opt_states(flat, parameters, optimizer.optimizer.state, keys)
            optimizer.optimizer.state[flat]["step"] = steps[0]
