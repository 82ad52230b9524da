"""Find files and folders that a configuration names and this machine lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.run_config import FlamingoRunConfig, RunConfig
from trainer.errors import Problem

_LOCAL_TOWER = "local-dir:"
_HF_TOWER = "transformers:"


def missing_files(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each path of a run that does not exist or is of the wrong kind."""
    for index, source in enumerate(config.data.sources):
        yield from missing_manifest(f"data.sources.{index}.manifest", source.manifest)
    if config.run_dir.exists() and not config.run_dir.is_dir():
        yield Problem("run_dir", f"{config.run_dir} is a file; name a folder")
    settings = config.deepspeed
    for name, offload in (("offload_param", settings.offload_param), ("offload_optimizer", settings.offload_optimizer)):
        if offload.path is not None and not offload.path.is_dir():
            yield Problem(f"deepspeed.{name}.path", f"no such folder: {offload.path}")
    if isinstance(config, FlamingoRunConfig):
        yield from _missing_models(config)


def missing_manifest(path: str, manifest: Path) -> Iterator[Problem]:
    """Yield a problem if the manifest that the setting ``path`` names does not exist."""
    if not manifest.is_file():
        command = f"python -m trainer.index --output {manifest} URL..."
        yield Problem(path, f"no such file: {manifest}; write it with {command}")


def missing_export(config: EvaluationConfig) -> Iterator[Problem]:
    """Yield a problem if the export that an evaluation names does not exist."""
    if not config.model.is_dir():
        yield Problem("model", f"no such folder: {config.model}; trainer.train writes it to RUN_DIR/export")


def _missing_models(config: FlamingoRunConfig) -> Iterator[Problem]:
    vision, language = config.model.vision, config.model.language_model
    hf_tower = vision.name.removeprefix(_HF_TOWER) if vision.name.startswith(_HF_TOWER) else None
    folders = {
        "language_model.name": language.name if _is_local(language.name) else None,
        "language_model.tokenizer": language.tokenizer if _is_local(language.tokenizer) else None,
        "vision.name": vision.name.removeprefix(_LOCAL_TOWER)
        if vision.name.startswith(_LOCAL_TOWER)
        else (hf_tower if _is_local(hf_tower) else None),
    }
    for key, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            yield Problem(f"model.{key}", f"no such folder: {folder}")
    start_from = config.model.start_from
    if start_from is not None and not Path(start_from).is_dir():
        message = f"no such folder: {start_from}; trainer.import_model or trainer.export writes it"
        yield Problem("model.start_from", message)
    if vision.pretrained and vision.pretrained.endswith(".safetensors") and not Path(vision.pretrained).is_file():
        yield Problem("model.vision.pretrained", f"no such file: {vision.pretrained}")


def _is_local(name: str | None) -> bool:
    """Return whether a name can only be a folder: a repository is OWNER/NAME, without a leading dot or slash."""
    return name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1)
