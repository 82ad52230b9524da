"""Check the settings that measure and limit what a language model forgets."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from trainer.config.checks.missing_files import missing_manifest
from trainer.config.data_config import TextSource
from trainer.config.forgetting_config import ForgettingConfig
from trainer.config.run_config import FlamingoRunConfig, RunConfig
from trainer.errors import Problem


def forgetting_problems(config: RunConfig, *, check_files: bool) -> Iterator[Problem]:
    """Yield the problems of ``forgetting``, and of the sources' ``kl_weight``.

    Args:
        config: Settings of the run.
        check_files: Whether the manifest must exist on this machine.
    """
    for index, source in enumerate(config.data.sources):
        if isinstance(source, TextSource) and source.kl_weight:
            yield from _penalty_problems(f"data.sources.{index}.kl_weight", config)
    if not isinstance(config, FlamingoRunConfig) or config.forgetting == ForgettingConfig():
        return
    manifest = config.forgetting.manifest
    if manifest is None:
        yield Problem("forgetting.manifest", "is needed by the other settings of forgetting; name held-out text")
        return
    if config.forgetting.max_tokens < 2:
        yield Problem("forgetting.max_tokens", f"{config.forgetting.max_tokens} predicts nothing; set at least 2")
    yield from _task_problems(config.forgetting, check_files)
    if check_files:
        yield from missing_manifest("forgetting.manifest", manifest)
    for index, source in enumerate(config.data.sources):
        if source.manifest.resolve() == manifest.resolve():
            path = f"data.sources.{index}.manifest"
            message = f"{manifest} is trained on ({path}); name text that is held out"
            yield Problem("forgetting.manifest", message, related=(path,))


def _task_problems(settings: ForgettingConfig, check_files: bool) -> Iterator[Problem]:
    if not settings.tasks:
        for name, value in (("task_folder", settings.task_folder), ("task_limit", settings.task_limit)):
            if value is not None:
                yield Problem(f"forgetting.{name}", f"{value} has no effect without forgetting.tasks; leave it out")
        return
    if check_files and importlib.util.find_spec("lm_eval") is None:
        message = "needs lm_eval, which is not installed: pip install 'flamingo-trainer[lm_eval]', or leave this out"
        yield Problem("forgetting.tasks", message)
    if check_files and settings.task_folder is not None and not settings.task_folder.is_dir():
        yield Problem("forgetting.task_folder", f"no such folder: {settings.task_folder}")


def _penalty_problems(path: str, config: RunConfig) -> Iterator[Problem]:
    if not isinstance(config, FlamingoRunConfig):
        yield Problem(path, "only trainer.train has a language model to stay close to; leave it out")
        return
    mode, setting = config.model.trainable.language_model, "model.trainable.language_model"
    if mode in ("full", "from_random"):
        message = (
            f"needs the language model as it was, and {setting} {mode} keeps no copy of it; take lora, or give this "
            "source more weight"
        )
        yield Problem(path, message, related=(setting,))
    elif mode == "frozen" and config.model.cross_attention.without_media != "feed_forward":
        message = (
            "would always be 0: the language model is frozen, and model.cross_attention.without_media leaves text "
            "alone; leave it out"
        )
        yield Problem(path, message, related=(setting,))
