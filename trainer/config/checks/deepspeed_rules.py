"""Check ZeRO's stage, its offload, and the optimizer that they allow."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.run_config import FROZEN_DEVICES, ContrastiveRunConfig, OffloadConfig, RunConfig
from trainer.errors import Problem


def deepspeed_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``deepspeed``, its raw JSON aside."""
    settings, stage = config.deepspeed, config.deepspeed.zero_stage
    if settings.hpz_partition_size > 1 and stage < 3:
        message = f"copies of partitioned parameters come with zero_stage 3 only, not with stage {stage}; set it to 1"
        yield Problem("deepspeed.hpz_partition_size", message, related=("deepspeed.zero_stage",))
    for name, offload in (("offload_param", settings.offload_param), ("offload_optimizer", settings.offload_optimizer)):
        path = f"deepspeed.{name}"
        only_stage_3 = name == "offload_param" or offload.device == "nvme"
        if offload.device != "none" and only_stage_3 and stage < 3:
            offloaded = "parameters" if name == "offload_param" else "optimizer state"
            message = f"{offloaded} can be offloaded to {offload.device} with zero_stage 3 only, not with stage {stage}"
            yield Problem(f"{path}.device", message, related=("deepspeed.zero_stage",))
        yield from _drive_problems(path, offload)
    yield from _frozen_problems(config)


def _frozen_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the contradictions between ``deepspeed.frozen`` and the other settings."""
    settings, stage, path = config.deepspeed, config.deepspeed.zero_stage, "deepspeed.frozen"
    frozen, device = settings.frozen, settings.offload_param.device
    if frozen is None:
        return
    if isinstance(config, ContrastiveRunConfig):
        yield Problem(path, f"{frozen}: both towers of this run train, so nothing is frozen; leave it out")
        return
    if frozen == "partitioned" and stage < 3:
        message = f"partitioned: zero_stage {stage} keeps frozen weights whole on every process; set it to replicated"
        yield Problem(path, message, related=("deepspeed.zero_stage",))
    if (own := FROZEN_DEVICES.get(frozen, "none")) != device:
        message = f"{frozen} means offload_param.device {own}, but that is {device}; leave one of the two out"
        yield Problem(path, message, related=("deepspeed.offload_param.device",))
    if settings.replicates_frozen and settings.hpz_partition_size > 1:
        message = (
            f"replicated keeps frozen weights whole, and hpz_partition_size {settings.hpz_partition_size} would keep "
            "a second copy of them in each node; set hpz_partition_size to 1"
        )
        yield Problem(path, message, related=("deepspeed.hpz_partition_size",))


def _drive_problems(path: str, offload: OffloadConfig) -> Iterator[Problem]:
    if offload.device == "nvme" and offload.path is None:
        yield Problem(f"{path}.path", "is required with device: nvme; name a folder on the drive")
    if offload.device != "nvme" and offload.path is not None:
        yield Problem(f"{path}.path", f"is for device: nvme, but device is {offload.device}; leave it out")


def optimizer_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``optimizer``."""
    device = config.deepspeed.offload_optimizer.device
    related = ("deepspeed.offload_optimizer.device",)
    if config.optimizer.name == "cpu_adam" and device == "none":
        message = "cpu_adam needs deepspeed.offload_optimizer.device cpu or nvme; without offload take adamw"
        yield Problem("optimizer.name", message, related=related)
    if config.optimizer.name == "apex_fused_adam" and device != "none":
        message = f"apex_fused_adam runs on the GPU; with optimizer state offloaded to {device} take cpu_adam or adamw"
        yield Problem("optimizer.name", message, related=related)
    for index, beta in enumerate(config.optimizer.betas):
        if beta >= 1:
            yield Problem(f"optimizer.betas.{index}", f"must be below 1, not {beta}")
