"""What no single setting can say: rules across settings, files that have to be there, libraries that are asked for.

Nothing here imports torch, so that a wrong configuration is reported within a second.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trainer.config.data_config import Source
from trainer.config.deepspeed_json import raw_problems
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.run_config import (
    ContrastiveRunConfig,
    DeepSpeedConfig,
    FlamingoRunConfig,
    LanguageModelRunConfig,
    OffloadConfig,
    RunConfig,
)
from trainer.errors import Problem

LOCAL_TOWER = "local-dir:"
TIMM_TOWER = "timm:"


def check_settings(config: object, *, check_files: bool = True) -> list[Problem]:
    """Everything that is wrong across settings.

    config: a RunConfig or an EvaluationConfig; nothing is known about others.
    check_files: also look for manifests, local folders and optional libraries on this machine.
    """
    if isinstance(config, EvaluationConfig):
        return list(_check_evaluation(config, check_files))
    if not isinstance(config, RunConfig):
        return []
    problems = [
        *_check_sources(config),
        *_check_lengths(config),
        *_check_deepspeed(config),
        *_check_optimizer(config),
        *_check_resilience(config),
        *_check_activations(config),
        *_check_logging(config),
        *_check_task(config),
        *raw_problems(config, check_files=check_files),
    ]
    if check_files:
        problems += [*_check_files(config), *_check_libraries(config)]
    return problems


def _check_sources(config: RunConfig) -> Iterator[Problem]:
    sources = config.data.sources
    if not sources:
        yield Problem("data.sources", "needs at least one source")
    yield from _check_unique("data.sources", [source.name for source in sources])
    for index, source in enumerate(sources):
        path = f"data.sources.{index}"
        if not source.name or "/" in source.name:
            yield Problem(f"{path}.name", f"{source.name!r} must not be empty nor hold a slash (it names metrics)")
        micro, batch = source.micro_batch_size, source.batch_size
        if micro is not None and batch % micro:
            yield Problem(
                f"{path}.micro_batch_size",
                f"{micro} does not divide batch_size {batch}; write a divisor of {batch}, or leave it out",
                related=(f"{path}.batch_size",),
            )
        if source.packing and getattr(source, "samples_per_row", 1) > 1:
            message = "is for rows that are not packed: a packed row takes as many samples as fit"
            yield Problem(f"{path}.samples_per_row", message, related=(f"{path}.packing",))
        yield from _check_ranges(path, source)
        if config.data.num_lanes is not None and batch % config.data.num_lanes:
            yield Problem(
                f"{path}.batch_size",
                f"{batch} is not a multiple of data.num_lanes {config.data.num_lanes}; each lane gives equally many samples",
                related=("data.num_lanes",),
            )


def _check_ranges(path: str, source: Source) -> Iterator[Problem]:
    """Bounds in the wrong order, which would leave out everything."""
    filters = source.filters
    for unit in ("characters", "words"):
        low, high = getattr(filters, f"min_{unit}"), getattr(filters, f"max_{unit}")
        if low is not None and high is not None and low > high:
            yield Problem(f"{path}.filters.min_{unit}", f"{low} is more than filters.max_{unit} {high}")
    for name in ("min_side", "max_aspect"):
        if source.type == "text" and getattr(filters, name) is not None:
            yield Problem(f"{path}.filters.{name}", "is about images, and this source has only text")
    augment = getattr(source, "augment", None)
    for name in ("crop_scale", "crop_ratio"):
        if augment is not None and getattr(augment, name)[0] > getattr(augment, name)[1]:
            low, high = getattr(augment, name)
            yield Problem(f"{path}.augment.{name}", f"goes from {low} to {high}; write the smaller number first")


def _check_lengths(config: RunConfig) -> Iterator[Problem]:
    steps, warmup = config.training.steps, config.schedule.warmup_steps
    if warmup > steps:
        yield Problem(
            "schedule.warmup_steps",
            f"{warmup} is more than training.steps {steps}: the learning rate would never be reached",
            related=("training.steps",),
        )
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every is not None and keep_every % every:
        yield Problem("checkpoint.keep_every", f"{keep_every} is not a multiple of checkpoint.every {every}")


def _check_resilience(config: RunConfig) -> Iterator[Problem]:
    spikes = config.resilience.spikes
    if spikes.min_steps > spikes.window:
        message = f"{spikes.min_steps} is more than spikes.window {spikes.window}, so no update would be judged"
        yield Problem("resilience.spikes.min_steps", message, related=("resilience.spikes.window",))
    watchdog, deadline = config.resilience.watchdog, config.data.read_deadline_seconds
    if watchdog.seconds is not None and watchdog.seconds <= deadline:
        message = f"{watchdog.seconds:g} must be more than data.read_deadline_seconds {deadline:g}: reads may take that"
        yield Problem("resilience.watchdog.seconds", message, related=("data.read_deadline_seconds",))
    if watchdog.seconds is not None and watchdog.seconds > watchdog.startup_seconds:
        message = f"{watchdog.startup_seconds:g} must not be less than watchdog.seconds {watchdog.seconds:g}"
        yield Problem("resilience.watchdog.startup_seconds", message, related=("resilience.watchdog.seconds",))
    for index, (first, last) in enumerate(config.resilience.skip_steps):
        if first > last:
            message = f"goes from {first} to {last}; write the smaller number first"
            yield Problem(f"resilience.skip_steps.{index}", message)


def _check_deepspeed(config: RunConfig) -> Iterator[Problem]:
    settings: DeepSpeedConfig = config.deepspeed
    stage = settings.zero_stage
    if settings.hpz_partition_size > 1 and stage < 3:
        message = f"copies of partitioned parameters come with zero_stage 3 only, not at stage {stage}; set it to 1"
        yield Problem("deepspeed.hpz_partition_size", message, related=("deepspeed.zero_stage",))
    for name, offload in (("offload_param", settings.offload_param), ("offload_optimizer", settings.offload_optimizer)):
        path = f"deepspeed.{name}"
        only_stage_3 = name == "offload_param" or offload.device == "nvme"
        if offload.device != "none" and only_stage_3 and stage < 3:
            what = "parameters" if name == "offload_param" else "optimizer state"
            message = f"{what} can be offloaded to {offload.device} with zero_stage 3 only, not at stage {stage}"
            yield Problem(f"{path}.device", message, related=("deepspeed.zero_stage",))
        yield from _check_nvme_path(path, offload)


def _check_nvme_path(path: str, offload: OffloadConfig) -> Iterator[Problem]:
    if offload.device == "nvme" and offload.path is None:
        yield Problem(f"{path}.path", "is required with device: nvme; name a folder on the drive")
    if offload.device != "nvme" and offload.path is not None:
        yield Problem(f"{path}.path", f"is for device: nvme, and device is {offload.device}")


def _check_optimizer(config: RunConfig) -> Iterator[Problem]:
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


def _check_logging(config: RunConfig) -> Iterator[Problem]:
    if (traced := config.logging.profile_steps) is not None and traced[0] > traced[1]:
        yield Problem("logging.profile_steps", f"goes from {traced[0]} to {traced[1]}; write [first, last]")


def _check_task(config: RunConfig) -> Iterator[Problem]:
    types = {"image_text", "video_text", "interleaved", "text"}
    if isinstance(config, FlamingoRunConfig):
        yield from _check_flamingo(config)
    if isinstance(config, LanguageModelRunConfig):
        types = {"text"}
        if "model_type" not in config.architecture:
            yield Problem("architecture", "needs a model_type of transformers, such as llama or gpt_neox")
    if isinstance(config, ContrastiveRunConfig):
        types = {"image_text"}
    for index, source in enumerate(config.data.sources):
        if not isinstance(config, FlamingoRunConfig) and getattr(source, "image_tokens", None) is not None:
            yield Problem(f"data.sources.{index}.image_tokens", "only trainer.train keeps the aspect; leave it out")
        if source.packing and isinstance(config, ContrastiveRunConfig):
            yield Problem(f"data.sources.{index}.packing", "contrastive training takes a caption a row; set false")
        if source.type not in types:
            message = f"{source.type} cannot be trained on here; this trainer takes {', '.join(sorted(types))}"
            yield Problem(f"data.sources.{index}.type", message)


def _check_activations(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if training.activation_memory_gib is None:
        return
    if not isinstance(config, FlamingoRunConfig):
        yield Problem("training.activation_memory_gib", "only trainer.train chooses blocks to recompute; leave it out")
    elif training.activation_checkpointing is not False:
        message = "decides itself how many blocks are recomputed; leave training.activation_checkpointing out"
        related = ("training.activation_checkpointing",)
        yield Problem("training.activation_memory_gib", message, related=related)


def _check_flamingo(config: FlamingoRunConfig) -> Iterator[Problem]:
    language, tokens = config.model.language_model, config.model.tokens
    if language.name is None and language.architecture is None:
        yield Problem("model.language_model.name", "is required: a Hugging Face repository or a local folder")
    if language.name is not None and language.architecture is not None:
        yield Problem("model.language_model.architecture", "builds random weights, so name must be left out (or null)")
    if language.name is None and language.architecture is not None and language.tokenizer is None:
        yield Problem("model.language_model.tokenizer", "is required where language_model.name is left out")
    if tokens.image == tokens.end_of_chunk:
        yield Problem("model.tokens.end_of_chunk", f"must differ from model.tokens.image, both are {tokens.image!r}")
    cross = config.model.cross_attention
    if cross.offset >= cross.every_n_layers:
        # Not wrong in itself, but the layer at offset - every would be expected and is missing.
        message = f"{cross.offset} must be below cross_attention.every_n_layers {cross.every_n_layers}"
        yield Problem("model.cross_attention.offset", message)
    for index, source in enumerate(config.data.sources):
        if getattr(source, "image_tokens", None) is not None:
            yield from _check_image_tokens(f"data.sources.{index}", source, config)


def _check_image_tokens(path: str, source: Source, config: FlamingoRunConfig) -> Iterator[Problem]:
    if config.model.vision.name.startswith(TIMM_TOWER):
        message = f"{config.model.vision.name} takes squares only; leave this out, or take an open_clip ViT"
        yield Problem(f"{path}.image_tokens", message, related=("model.vision.name",))
    frames = source.frames_in_medium
    if frames > config.model.resampler.num_frames:
        message = (
            f"{frames} is more than model.resampler.num_frames {config.model.resampler.num_frames}, and time embeddings are "
            "not interpolated where image_tokens is set"
        )
        yield Problem(f"{path}.num_frames", message, related=("model.resampler.num_frames",))


def _check_evaluation(config: EvaluationConfig, check_files: bool) -> Iterator[Problem]:
    yield from _check_unique("tasks", [task.name for task in config.tasks])
    for index, task in enumerate(config.tasks):
        path = f"tasks.{index}"
        if task.minimum is not None and task.maximum is not None and task.minimum > task.maximum:
            yield Problem(f"{path}.minimum", f"{task.minimum} is more than maximum {task.maximum}")
        if check_files and not task.manifest.is_file():
            yield _missing_manifest(f"{path}.manifest", task.manifest)
    if check_files and not config.model.is_dir():
        yield Problem("model", f"no such folder: {config.model}; trainer.train writes it to RUN_DIR/export")


def _check_unique(path: str, names: list[str]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(path, f"{count} are named {name!r}; give each its own name")


def _missing_manifest(path: str, manifest: Path) -> Problem:
    command = f"python -m trainer.index --output {manifest} URL..."
    return Problem(path, f"no such file: {manifest}; write it with {command}")


def _check_files(config: RunConfig) -> Iterator[Problem]:
    for index, source in enumerate(config.data.sources):
        if not source.manifest.is_file():
            yield _missing_manifest(f"data.sources.{index}.manifest", source.manifest)
    if config.run_dir.exists() and not config.run_dir.is_dir():
        yield Problem("run_dir", f"{config.run_dir} is a file; name a folder")
    for name in ("offload_param", "offload_optimizer"):
        folder = getattr(config.deepspeed, name).path
        if folder is not None and not folder.is_dir():
            yield Problem(f"deepspeed.{name}.path", f"no such folder: {folder}")
    if isinstance(config, FlamingoRunConfig):
        vision, language = config.model.vision, config.model.language_model
        folders = [("language_model.name", language.name or ""), ("language_model.tokenizer", language.tokenizer or "")]
        if vision.name.startswith(LOCAL_TOWER):
            folders.append(("vision.name", vision.name.removeprefix(LOCAL_TOWER)))
        for key, folder in folders:
            if _looks_local(folder, key) and not Path(folder).is_dir():
                yield Problem(f"model.{key}", f"no such folder: {folder}")
        if vision.pretrained and vision.pretrained.endswith(".safetensors") and not Path(vision.pretrained).is_file():
            yield Problem("model.vision.pretrained", f"no such file: {vision.pretrained}")
    if isinstance(config, ContrastiveRunConfig) and config.tokenizer is not None and not config.tokenizer.is_dir():
        yield Problem("tokenizer", f"no such folder: {config.tokenizer}")


def _looks_local(name: str, key: str) -> bool:
    """Repositories are OWNER/NAME; anything deeper, or with a leading dot or slash, can only be a folder."""
    return bool(name) and (key == "vision.name" or name.startswith((".", "/", "~")) or name.count("/") > 1)


def _check_libraries(config: RunConfig) -> Iterator[Problem]:
    problem = check_optimizer_available(config.optimizer.name)
    if problem is not None:
        yield Problem("optimizer.name", problem)
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield Problem("logging.wandb_project", "wandb is not installed: pip install wandb, or leave this out")
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield Problem("logging.tensorboard", "tensorboard is not installed: pip install tensorboard, or set false")


def check_optimizer_available(name: str) -> str | None:
    """Why this machine cannot run an optimizer and how to change that; None when it can, as far as can be told.

    Nothing is imported and nothing compiled: DeepSpeedCPUAdam is built by DeepSpeed at its first use.
    """
    if name == "cpu_adam":
        compiler = os.environ.get("CXX", "c++").split()[0]
        if importlib.util.find_spec("deepspeed") is None:
            return "cpu_adam is part of deepspeed, which is not installed"
        missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
        if missing == ["ninja"] and importlib.util.find_spec("ninja") is not None:
            missing = []
        if missing:
            return f"cpu_adam is compiled at its first use and needs {' and '.join(missing)}; install it, or take adamw"
    if name == "apex_fused_adam" and not _has_nvidia_apex():
        return (
            "NVIDIA apex is not installed; build it from github.com/NVIDIA/apex with --cpp_ext --cuda_ext (the package "
            "called apex on PyPI is another project), or take adamw, torch's own fused AdamW"
        )
    return None


def _has_nvidia_apex() -> bool:
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec is not None else None
    has_optimizer = any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders or ())
    return has_optimizer and importlib.util.find_spec("amp_C") is not None


def allowed_world_sizes(config: RunConfig) -> list[int]:
    """The numbers of processes that divide every source's lanes and leave whole micro-batches."""
    largest = min(source.batch_size for source in config.data.sources)
    return [size for size in range(1, largest + 1) if not _misfits(config, size)]


def world_size_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """One problem for each source whose batch this number of processes cannot share, and for hpZ's groups that are not
    whole, with the sizes that can."""
    misfits = _misfits(config, world_size)
    if not misfits:
        return []
    allowed = ", ".join(map(str, allowed_world_sizes(config))) or "none: the batch sizes have no size in common"
    return [
        Problem(path, f"{message}; possible numbers of processes for this configuration: {allowed}")
        for path, message in misfits
    ]


def _misfits(config: RunConfig, world_size: int) -> list[tuple[str, str]]:
    misfits: list[tuple[str, str]] = []
    for index, source in enumerate(config.data.sources):
        lanes = config.data.num_lanes or source.batch_size
        per_rank, rest = divmod(source.batch_size, world_size)
        micro = source.micro_batch_size or max(1, per_rank)
        path = f"data.sources.{index}.batch_size"
        if lanes % world_size or rest:
            what = f"data.num_lanes {lanes}" if config.data.num_lanes else f"batch_size {source.batch_size}"
            misfits.append((path, f"{what} of {source.name} is not a multiple of {world_size} processes"))
        elif per_rank % micro:
            message = (
                f"{per_rank} sequences of {source.name} a process ({source.batch_size} / {world_size}) are not whole "
                f"micro-batches of {micro}"
            )
            misfits.append((path, message))
    hpz = config.deepspeed.hpz_partition_size
    if world_size % hpz:
        message = f"{world_size} processes are not whole groups of {hpz}, each with a copy of the parameters"
        misfits.append(("deepspeed.hpz_partition_size", message))
    return misfits
