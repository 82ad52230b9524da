"""Check the settings of contrastive pretraining against each other and against this machine."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.checks.data_rules import duplicate_names
from trainer.config.contrastive_config import TowerClipConfig
from trainer.config.run_config import ContrastiveRunConfig, RunConfig
from trainer.errors import Problem


def contrastive_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of contrastive pretraining, files aside."""
    if not isinstance(config, ContrastiveRunConfig):
        return
    if config.loss.kind == "sigmoid" and config.loss.label_smoothing > 0:
        message = f"{config.loss.label_smoothing} is for the softmax loss alone; set it to 0, or loss.kind to softmax"
        yield Problem("loss.label_smoothing", message, related=("loss.kind",))
    if config.clip_towers != TowerClipConfig() and config.optimizer.clip_grad_norm != "none":
        message = f"{config.optimizer.clip_grad_norm} would clip both towers again; set it to none"
        yield Problem("optimizer.clip_grad_norm", message, related=("clip_towers",))
    for index, source in enumerate(config.data.sources):
        if source.micro_batch_tokens is not None:
            message = "counts tokens of rows, and a pair here is an image with a caption; set micro_batch_size"
            yield Problem(f"data.sources.{index}.micro_batch_tokens", message)
    if isinstance(config.architecture, dict):
        yield from _architecture_problems(config, config.architecture)
    names = [test.name for test in config.zero_shot.classification]
    names += [retrieval.name for retrieval in config.zero_shot.retrieval]
    yield from duplicate_names("zero_shot", names)
    for index, test in enumerate(config.zero_shot.classification):
        for number, template in enumerate(test.templates):
            if "{}" not in template:
                message = f"{template!r} has no {{}} for the name of the class"
                yield Problem(f"zero_shot.classification.{index}.templates.{number}", message)


def _architecture_problems(config: ContrastiveRunConfig, architecture: dict[str, object]) -> Iterator[Problem]:
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(architecture.get(section), dict):
            yield Problem("architecture", f"needs {section}, a mapping, as open_clip's model configs have it")
    text = architecture.get("text_cfg")
    if isinstance(text, dict) and "hf_model_name" in text and config.tokenizer is None:
        message = "is required with architecture.text_cfg.hf_model_name: a folder with the text tower's own tokenizer"
        yield Problem("tokenizer", message, related=("architecture",))


def combine_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``training.combine``."""
    combine = config.training.combine
    if combine == "merged":
        for index, source in enumerate(config.data.sources):
            if source.weight != 1:
                message = f"{source.weight}: merged sources count by their batch_size; leave the weight out"
                yield Problem(f"data.sources.{index}.weight", message, related=("training.combine",))


def missing_contrastive_files(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each file of contrastive pretraining that does not exist."""
    if not isinstance(config, ContrastiveRunConfig):
        return
    if config.tokenizer is not None and not config.tokenizer.is_dir():
        yield Problem("tokenizer", f"no such folder: {config.tokenizer}")
    if config.start_from is not None and not config.start_from.is_dir():
        message = f"no such folder: {config.start_from}; trainer.pretrain_vision writes it to RUN_DIR/export"
        yield Problem("start_from", message)
    for index, test in enumerate(config.zero_shot.classification):
        if not test.folder.is_dir():
            yield Problem(f"zero_shot.classification.{index}.folder", f"no such folder: {test.folder}")
        if test.class_names is not None and not test.class_names.is_file():
            yield Problem(f"zero_shot.classification.{index}.class_names", f"no such file: {test.class_names}")
    for index, retrieval in enumerate(config.zero_shot.retrieval):
        if not retrieval.captions.is_file():
            yield Problem(f"zero_shot.retrieval.{index}.captions", f"no such file: {retrieval.captions}")
        if not retrieval.images.is_dir():
            yield Problem(f"zero_shot.retrieval.{index}.images", f"no such folder: {retrieval.images}")
