"""Check that sources and model fit the task, and that the parts of a Flamingo fit together."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.data_config import MediaSource, PairSource
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig, RunConfig
from trainer.errors import Problem

_TIMM_TOWER = "timm:"


def task_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the sources and the model of a task."""
    if isinstance(config, FlamingoRunConfig):
        yield from _flamingo_problems(config)
        return
    types = {"image_text", "video_text", "interleaved", "text"}
    if isinstance(config, LanguageModelRunConfig):
        types = {"text"}
        if "model_type" not in config.architecture:
            yield Problem("architecture", "needs a model_type of transformers, such as llama or gpt_neox")
    if isinstance(config, ContrastiveRunConfig):
        types = {"image_text"}
    for index, source in enumerate(config.data.sources):
        path = f"data.sources.{index}"
        if isinstance(source, MediaSource) and source.image_tokens is not None:
            yield Problem(f"{path}.image_tokens", "only trainer.train keeps the aspect of images; leave it out")
        if isinstance(config, ContrastiveRunConfig):
            if source.packing:
                yield Problem(f"{path}.packing", "contrastive training takes one caption per row; set it to false")
            if isinstance(source, PairSource) and source.train_on == "answer":
                message = "contrastive training compares the image with the .txt alone; leave it out"
                yield Problem(f"{path}.train_on", message)
        if source.type not in types:
            message = f"{source.type} is not a source of this trainer; it takes {', '.join(sorted(types))}"
            yield Problem(f"{path}.type", message)


def activation_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``training.activation_memory_gib``."""
    training = config.training
    if training.activation_memory_gib is None:
        return
    if not isinstance(config, FlamingoRunConfig):
        message = "only trainer.train chooses the blocks to recompute; leave it out"
        yield Problem("training.activation_memory_gib", message)
    elif training.activation_checkpointing is not False:
        message = "decides how many blocks are recomputed; leave training.activation_checkpointing out"
        related = ("training.activation_checkpointing",)
        yield Problem("training.activation_memory_gib", message, related=related)


def _flamingo_problems(config: FlamingoRunConfig) -> Iterator[Problem]:
    language, tokens = config.model.language_model, config.model.tokens
    if language.name is None and language.architecture is None:
        yield Problem("model.language_model.name", "is required: a Hugging Face repository or a local folder")
    if language.name is not None and language.architecture is not None:
        yield Problem("model.language_model.architecture", "builds random weights, so name must be left out (or null)")
    if language.name is None and language.architecture is not None and language.tokenizer is None:
        yield Problem("model.language_model.tokenizer", "is required where language_model.name is left out")
    if tokens.image == tokens.end_of_chunk:
        yield Problem("model.tokens.end_of_chunk", f"must differ from model.tokens.image, both are {tokens.image!r}")
    vision = config.model.vision
    if vision.architecture is not None and language.architecture is None and config.model.start_from is None:
        message = f"builds {vision.name} with random weights, which stay frozen: set model.start_from, or null here"
        yield Problem("model.vision.architecture", message, related=("model.start_from",))
    cross = config.model.cross_attention
    if cross.offset >= cross.every_n_layers:
        # The model could be built, but would lack the layer at offset - every_n_layers, which readers expect.
        message = f"{cross.offset} must be below cross_attention.every_n_layers {cross.every_n_layers}"
        yield Problem("model.cross_attention.offset", message)
    if vision.padding_tiles and config.model.resampler.kind != "linear":
        message = "gives keys to padding, which only resampler.kind linear can tell apart; set it to false"
        yield Problem("model.vision.padding_tiles", message, related=("model.resampler.kind",))
    for index, source in enumerate(config.data.sources):
        if cross.without_media == "all_media" and source.packing:
            message = "text would attend to the media of other documents (cross_attention.without_media: all_media)"
            related = ("model.cross_attention.without_media",)
            yield Problem(f"data.sources.{index}.packing", message, related=related)
        if isinstance(source, MediaSource) and source.image_tokens is not None:
            yield from _image_token_problems(f"data.sources.{index}", source, config)


def _image_token_problems(path: str, source: MediaSource, config: FlamingoRunConfig) -> Iterator[Problem]:
    if config.model.vision.name.startswith(_TIMM_TOWER):
        message = f"{config.model.vision.name} takes squares only; leave image_tokens out, or take an open_clip ViT"
        yield Problem(f"{path}.image_tokens", message, related=("model.vision.name",))
    num_frames, trained = source.frames_in_medium, config.model.resampler.num_frames
    if config.model.resampler.kind == "perceiver" and 0 < trained < num_frames:
        message = (
            f"{num_frames} is more than model.resampler.num_frames {trained}; time embeddings are not interpolated "
            "where image_tokens is set"
        )
        yield Problem(f"{path}.num_frames", message, related=("model.resampler.num_frames",))
