"""Check the settings of an evaluation against each other and against the files on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from trainer.config.checks.data_rules import duplicate_names
from trainer.config.checks.missing_files import missing_manifest
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.evaluation_tasks import BaseTask, CocoTask, HatefulMemesTask, KarpathyTask, ShardsTask, VqaTask
from trainer.config.run_config import FlamingoRunConfig, RunConfig
from trainer.config.scoring_config import LiveEvaluationConfig, ScoringConfig
from trainer.errors import Problem

_INSTALL = 'which is not installed: pip install "flamingo-trainer[evaluation]"'
_FOLDERS = ("images", "support_images", "videos", "support_videos")


def scoring_problems(config: ScoringConfig, *, prefix: str = "", check_files: bool = True) -> Iterator[Problem]:
    """Yield the problems of tasks and of how they are scored.

    Args:
        config: Settings.
        prefix: Section of the settings, with a dot ("evaluation.").
        check_files: Whether the files of tasks must exist on this machine.
    """
    if not config.tasks:
        yield Problem(f"{prefix}tasks", "needs at least one task")
    yield from duplicate_names(f"{prefix}tasks", [task.name for task in config.tasks])
    if not 0 < config.confidence < 1:
        yield Problem(f"{prefix}confidence", f"{config.confidence} must lie between 0 and 1, such as 0.95")
    if not config.shots:
        yield Problem(f"{prefix}shots", "needs at least one number, such as [0]")
    for number, task in enumerate(config.tasks):
        path = f"{prefix}tasks.{number}"
        if not task.name or "/" in task.name:
            message = (
                f"{task.name!r} must not be empty and must not contain a slash, because it names files and metrics"
            )
            yield Problem(f"{path}.name", message)
        if task.shots == ():
            yield Problem(
                f"{path}.shots", "needs at least one number, such as [0]; leave it out for those of all tasks"
            )
        yield from _support_problems(task, path)
        if check_files:
            yield from _missing_files(task, path)
            yield from _missing_library(task, path)
    if check_files and config.demonstrations == "rices" and importlib.util.find_spec("faiss") is None:
        yield Problem(f"{prefix}demonstrations", f"rices needs faiss-cpu, {_INSTALL}; or take random")


def _missing_library(task: BaseTask, path: str) -> Iterator[Problem]:
    needed = None
    if isinstance(task, CocoTask | KarpathyTask) or (isinstance(task, ShardsTask) and task.metric == "cider"):
        needed = ("pycocoevalcap", "CIDEr needs pycocoevalcap")
    elif isinstance(task, HatefulMemesTask):
        needed = ("sklearn", "ROC-AUC needs scikit-learn")
    if needed is not None and importlib.util.find_spec(needed[0]) is None:
        yield Problem(f"{path}.type", f"{needed[1]}, {_INSTALL}")


def _support_problems(task: BaseTask, path: str) -> Iterator[Problem]:
    if isinstance(task, VqaTask) and (task.support_questions is None) != (task.support_annotations is None):
        lacking = "support_questions" if task.support_questions is None else "support_annotations"
        yield Problem(f"{path}.{lacking}", "is missing: demonstrations need questions and annotations")
    if isinstance(task, ShardsTask) and task.samples == "interleaved" and task.support_manifest is not None:
        message = "documents bring their own demonstrations; leave it out"
        yield Problem(f"{path}.support_manifest", message, related=(f"{path}.samples",))
    if isinstance(task, ShardsTask) and task.samples == "image_text" and task.image != 1:
        message = f"{task.image} is for documents; a pair has one image"
        yield Problem(f"{path}.image", message, related=(f"{path}.samples",))


def _missing_files(task: BaseTask, path: str) -> Iterator[Problem]:
    for entry in fields(task):
        value = getattr(task, entry.name)
        if not isinstance(value, Path) or "{" in str(value):
            continue
        if entry.name in ("manifest", "support_manifest"):
            yield from missing_manifest(f"{path}.{entry.name}", value)
        elif entry.name in _FOLDERS and not value.is_dir():
            yield Problem(f"{path}.{entry.name}", f"no such folder: {value}")
        elif entry.name not in _FOLDERS and not value.is_file():
            yield Problem(f"{path}.{entry.name}", f"no such file: {value}")


def live_evaluation_problems(config: RunConfig, *, check_files: bool) -> Iterator[Problem]:
    """Yield the problems of ``evaluation`` in a training run, and of ``checkpoint.best_metric``."""
    evaluation = config.evaluation if isinstance(config, FlamingoRunConfig) else LiveEvaluationConfig()
    if evaluation.tasks:
        yield from scoring_problems(evaluation, prefix="evaluation.", check_files=check_files)
        if evaluation.demonstrations == "rices":
            message = "'rices' is for trainer.evaluate; a training run draws demonstrations at random"
            yield Problem("evaluation.demonstrations", message)
    metric = config.checkpoint.best_metric
    if config.checkpoint.patience is not None:
        yield from _patience_problems(config, config.checkpoint.patience, evaluation)
    if metric == "loss":
        return
    known = list(_metric_names(evaluation))
    if metric not in known:
        names = f"loss, {', '.join(known)}" if known else "loss, and without evaluation.tasks nothing else"
        yield Problem("checkpoint.best_metric", f"{metric!r} is not measured; there is {names}")
    elif config.checkpoint.every % evaluation.every:
        message = (
            f"{config.checkpoint.every} is no multiple of evaluation.every ({evaluation.every}): checkpoints would be "
            "compared by scores of earlier steps"
        )
        yield Problem("checkpoint.every", message, related=("evaluation.every",))


def _patience_problems(config: RunConfig, patience: int, evaluation: LiveEvaluationConfig) -> Iterator[Problem]:
    path, steps = "checkpoint.patience", config.training.steps
    if config.checkpoint.best_metric == "loss":
        message = (
            "counts evaluations, but checkpoint.best_metric is loss: set it to eval/TASK/SHOTS of evaluation.tasks"
        )
        yield Problem(path, message, related=("checkpoint.best_metric",))
    elif (patience + 1) * evaluation.every >= steps:
        message = (
            f"{patience} never ends a run of {steps} steps with an evaluation every {evaluation.every}: take fewer, or "
            "leave it out"
        )
        yield Problem(path, message, related=("evaluation.every",))
    if config.checkpoint.keep_best == 0:
        yield Problem("checkpoint.keep_best", "0 keeps no best checkpoint for checkpoint.patience; set at least 1")


def _metric_names(evaluation: LiveEvaluationConfig) -> Iterator[str]:
    for task in evaluation.tasks:
        if isinstance(task, ShardsTask) and task.samples == "interleaved":
            yield f"eval/{task.name}/{task.image - 1}"
            continue
        for shots in evaluation.shots if task.shots is None else task.shots:
            yield f"eval/{task.name}/{shots}"


def evaluation_problems(config: EvaluationConfig, check_files: bool) -> Iterator[Problem]:
    """Yield the problems of ``trainer.evaluate``; ``check_files`` as for ``scoring_problems``."""
    yield from scoring_problems(config, check_files=check_files)
    offload = config.deepspeed.offload_param
    if offload.device != "none" and config.deepspeed.zero_stage == 0:
        message = f"{offload.device!r} is for deepspeed.zero_stage 3, which partitions the parameters"
        yield Problem("deepspeed.offload_param.device", message, related=("deepspeed.zero_stage",))
    if (offload.device == "nvme") != (offload.path is not None):
        yield Problem("deepspeed.offload_param.path", "names a folder for the device nvme, and only for it")
    if config.deepspeed.zero_stage == 3 and config.device is not None:
        yield Problem("device", f"{config.device!r}: each process of ZeRO-3 has the device of its number; leave it out")
    if config.output.exists() and not config.output.is_dir():
        yield Problem("output", f"{config.output} is a file; name a folder")
