"""Build, train, save and load a model with DeepSpeed.

DeepSpeed averages gradients over ranks. The engine undoes that, because the loop normalizes the loss over the global
batch. The optimizer therefore receives ``sum over sources of weight * (summed loss / normalizer)``, clipped once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from model.parameters import Gather, Partition, Redraw, no_gather
from trainer.config.run_config import OptimizerConfig
from trainer.deepspeed_engine import partitioned_linear
from trainer.deepspeed_engine.checkpoint_internals import (
    Write,
    load_universal_checkpoint,
    own_settings_kept,
    saved_tensor_sizes,
    write_checkpoints_with,
)
from trainer.deepspeed_engine.frozen_blocks import gather_frozen_blocks_together
from trainer.deepspeed_engine.internals import is_partitioned, omit_recovery_scripts, replicate, shared_hpz_group
from trainer.deepspeed_engine.optimizer import (
    build_optimizer,
    parameter_groups,
    set_learning_rate,
    set_type_of_steps,
)
from trainer.deepspeed_engine.part_clipping import PartClipper, PartClipping
from trainer.deepspeed_engine.part_norms import PartNorms
from trainer.deepspeed_engine.shard_layout import shard_layout
from trainer.deepspeed_engine.swap_internals import shared_parameter_swapper
from trainer.runtime.cpu_matmul import CpuMatmul, use_cpu_matmul
from trainer.runtime.distributed import World


@dataclass(frozen=True)
class PartitionedBuild:
    """Contexts in which a model is built so that no process ever holds all of it.

    Attributes:
        gather: Makes the given parameters readable in whole, whether or not they are partitioned.
        partition: Partitions the parameters of new modules as they are made.
        overwrite: Makes the given parameters whole, and keeps what is written to them.
        redraw: Gives a partitioned model the weights of one that a function builds whole, on rank 0 only; a collective.
    """

    gather: Gather
    partition: Partition
    overwrite: Gather = no_gather
    redraw: Redraw | None = None


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[PartitionedBuild]:
    """Partition every model that transformers loads in this context, if the settings ask for ZeRO-3.

    Args:
        settings: DeepSpeed's JSON.
    """
    if settings["zero_optimization"]["stage"] < 3:
        yield PartitionedBuild(gather=no_gather, partition=nullcontext)
        return
    partitioned_linear.install()
    # transformers partitions while an HfDeepSpeedConfig is alive, so this reference must not be dropped.
    alive = HfDeepSpeedConfig(settings)
    try:
        with shared_hpz_group(), shared_parameter_swapper():
            yield PartitionedBuild(
                gathered_parameters,
                lambda: deepspeed.zero.Init(config_dict_or_path=settings),
                overwritten_parameters,
                partial(_redraw, alive),
            )
    finally:
        del alive
        unset_hf_deepspeed_config()


def gathered_parameters(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Make parameters readable in whole, whether or not ZeRO-3 partitioned them; a collective if it did."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext()


def overwritten_parameters(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Make parameters whole and keep what rank 0 writes to them; a collective if ZeRO-3 partitioned them."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0) if partitioned else nullcontext()


def copy_parameters(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into parameters, whether or not ZeRO-3 partitioned them; a collective if it did.

    Args:
        parameters: Parameters by name.
        state: A tensor for each of them. Of partitioned parameters rank 0's are taken, and others may have none.
    """
    for name, parameter in parameters.items():
        writes = not is_partitioned(parameter) or torch.distributed.get_rank() == 0
        with torch.no_grad(), overwritten_parameters([parameter]):
            if writes:
                parameter.copy_(state[name])


def _redraw(alive: HfDeepSpeedConfig, model: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Give a model the weights that ``build`` draws while transformers partitions nothing."""
    drawn: dict[str, nn.Parameter] = {}
    if torch.distributed.get_rank() == 0:
        unset_hf_deepspeed_config()
        try:
            drawn = dict(build().named_parameters())
        finally:
            set_hf_deepspeed_config(alive)
    copy_parameters(dict(model.named_parameters()), drawn)


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step, the same on every rank.

    Attributes:
        applied: False if the gradient of any rank was not finite; the step then changed nothing.
        grad_norm: Norm of the global gradient before clipping.
        part_squares: This rank's share of the squared norm of each part's gradient before clipping, by part.
    """

    applied: bool
    grad_norm: float
    part_squares: Mapping[str, float] = field(default_factory=dict)


class Engine:
    """Train a module with DeepSpeed.

    Args:
        module: ``module(**inputs)`` returns an object with ``loss``, summed over all that this rank trains on.
        optimizer: Settings of the optimizer.
        settings: DeepSpeed's JSON.
        world: Processes of the run.
        cpu_matmul: ``training.cpu_matmul``; has no effect on other devices.
        clip_parts: Parts whose gradients are clipped by themselves; DeepSpeed's JSON then has no clipping of its own.
        measured_part: Returns the part of a parameter, by its name, for ``StepResult.part_squares``; None: none.
        replicate_frozen: Whether ZeRO-3 keeps frozen parameters whole on every process, instead of partitioned.

    Attributes:
        layout: Settings that the layout of the shards depends on, by dotted name.

    Raises:
        ValueError: Every parameter is frozen.
        ConfigError: This machine cannot do ``cpu_matmul``.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        settings: dict[str, Any],
        world: World,
        cpu_matmul: CpuMatmul = "auto",
        clip_parts: Sequence[PartClipping] = (),
        measured_part: Callable[[str], str] | None = None,
        replicate_frozen: bool = False,
    ) -> None:
        self.world = world
        if world.device.type == "cpu":
            use_cpu_matmul(cpu_matmul)
        partitioned_linear.install()
        self._learning_rate, self._optimizer_name = optimizer.lr, optimizer.name
        groups = parameter_groups(module.named_parameters(), optimizer)
        if not groups:
            raise ValueError("nothing to train: every parameter of the model is frozen")
        if replicate_frozen and settings["zero_optimization"]["stage"] == 3:
            frozen = (parameter for parameter in module.parameters() if not parameter.requires_grad)
            replicate(frozen, world.device)
        zero = settings["zero_optimization"]
        is_on_drive = zero.get("offload_param", {}).get("device") == "nvme"
        # A CPU rounds products of parameters that lie elsewhere in memory in another way. From a drive it must be so:
        # DeepSpeed would release a recomputed block's parameters before its backward, and then find no free buffer.
        if zero["stage"] == 3 and (world.device.type != "cpu" or is_on_drive):
            gather_frozen_blocks_together(module)
        self.layout: Mapping[str, Any] = shard_layout(module, groups, optimizer.name, settings)
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(groups, optimizer), config=settings
        )
        omit_recovery_scripts(self._deepspeed)
        self._clipper = PartClipper(module, clip_parts) if clip_parts else None
        self._norms = None if measured_part is None else PartNorms(module, measured_part)
        move_buffers(module, world.device)

    @property
    def module(self) -> nn.Module:
        """The module as it was given; its parameters may be partitioned."""
        module: nn.Module = self._deepspeed.module
        return module

    def forward_backward(self, inputs: dict[str, Tensor], scale: float, *, is_last: bool) -> Tensor:
        """Run a micro-step: add the gradient of ``scale * loss``, summed over all ranks, to the gradient of the step.

        Args:
            inputs: Keyword arguments of the module.
            scale: Factor of the loss in the gradient.
            is_last: Whether this is the last micro-step before ``step``; the same on every rank.

        Returns:
            The detached loss of this rank, not scaled: a scalar on the device. Reading it waits for the device.
        """
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self._deepspeed(**inputs).loss
        # Undoes DeepSpeed's average over ranks: the loop's normalizer counts the global batch already.
        self._deepspeed.backward(loss * (scale * self.world.size), scale_wrt_gas=False)
        return loss.detach()

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """Return the module's output, with a graph for ``backward`` unless the caller turned gradients off."""
        return self._deepspeed(**inputs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a loss, averaged over the ranks, to the gradient of the step.

        Args:
            loss: Loss of this rank, of an output of ``forward``.
            is_last: Whether this is the last micro-step before ``step``; the same on every rank.
        """
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the module into evaluation mode, without gradients, for calls of ``forward``."""
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._deepspeed.train()

    def step(self, learning_rate_factor: float) -> StepResult:
        """Clip and apply the accumulated gradient.

        Args:
            learning_rate_factor: Factor of the configured learning rate.
        """
        set_learning_rate(self._optimizer.param_groups, self._learning_rate * learning_rate_factor)
        assert self._deepspeed.is_gradient_accumulation_boundary(), "the last micro-step was not given is_last=True"
        squares = {} if self._norms is None else self._norms.squares()
        clipped_from = None if self._clipper is None else self._clipper.clip()
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm() if clipped_from is None else clipped_from
        norm = float("nan") if norm is None else float(norm)
        return StepResult(bool(self._deepspeed.was_step_applied()), norm, squares)

    def shard_sizes(self) -> list[tuple[torch.dtype, int]]:
        """Return type and length of the optimizer tensors that ``save`` passes to its writer on this rank."""
        return saved_tensor_sizes(self._deepspeed)

    def save(self, folder: Path, tag: str, write: Write) -> None:
        """Pass this rank's trainable weights and optimizer state to a writer; a collective.

        Args:
            folder: Folder of all checkpoints.
            tag: Name of this checkpoint in it.
            write: Called with each file's content and path. It must not keep the tensors after it returns, because the
                next step changes them.
        """
        write_checkpoints_with(self._deepspeed, write)
        self._deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> None:
        """Load a checkpoint that the same number of processes saved with the same layout; a collective.

        The optimizer keeps this run's settings.

        Raises:
            RuntimeError: DeepSpeed finds no checkpoint there.
        """
        with own_settings_kept(self._deepspeed):
            path, _ = self._deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
            _require_found(path, folder / tag)
        set_type_of_steps(self._optimizer.optimizer, self._optimizer_name)

    def load_universal(self, folder: Path, tag: str) -> None:
        """Load a checkpoint in DeepSpeed's universal format, saved with any number of processes and layout.

        A collective. The optimizer keeps this run's settings.

        Raises:
            RuntimeError: DeepSpeed finds no checkpoint there.
        """
        with own_settings_kept(self._deepspeed):
            path = load_universal_checkpoint(self._deepspeed, folder, tag)
            self._load_buffers(_require_found(path, folder / tag))
        set_type_of_steps(self._optimizer.optimizer, self._optimizer_name)

    def _load_buffers(self, model_states: Path) -> None:
        """Load buffers that training changes (batch norm's statistics); DeepSpeed's universal loader omits them."""
        saved = torch.load(model_states, map_location="cpu", weights_only=False)["module"]
        for name, buffer in self.module.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move every buffer of a module to a device.

    DeepSpeed moves no buffer of a module that has a partitioned parameter. It moves parameters as it partitions them.
    """
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


def _require_found(path: Path | None, searched: Path) -> Path:
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {searched}")
    return path
