"""Check the sources of samples: names, batch sizes, ranges of filters and augmentations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from trainer.config.batch_sizes import batch_size_problems
from trainer.config.data_config import FilterConfig, MediaSource, PairSource, Source
from trainer.config.run_config import ContrastiveRunConfig, RunConfig
from trainer.errors import Problem


def source_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``data.sources``."""
    sources = config.data.sources
    if not sources:
        yield Problem("data.sources", "needs at least one source")
    yield from duplicate_names("data.sources", [source.name for source in sources])
    for index, source in enumerate(sources):
        path = f"data.sources.{index}"
        if not source.name or "/" in source.name:
            message = f"{source.name!r} must not be empty and must not contain a slash, because it names metrics"
            yield Problem(f"{path}.name", message)
        if source.packing and source.samples_in_row > 1:
            message = "is for rows that are not packed; a packed row takes as many samples as fit"
            yield Problem(f"{path}.samples_per_row", message, related=(f"{path}.packing",))
        yield from _length_problems(path, source, config)
        yield from _filter_problems(f"{path}.filters", source)
        if isinstance(source, MediaSource):
            yield from _crop_problems(f"{path}.augment", source)
        if isinstance(source, PairSource) and source.train_on == "all" and source.answer_prefix != " ":
            message = "stands between a prompt and an answer; set train_on: answer, or leave it out"
            yield Problem(f"{path}.answer_prefix", message, related=(f"{path}.train_on",))
    if config.data.augmentation == "device" and not isinstance(config, ContrastiveRunConfig):
        yield Problem("data.augmentation", "device is for trainer.pretrain_vision only; take loader")
    yield from batch_size_problems(config.data)


def duplicate_names(path: str, names: list[str]) -> Iterator[Problem]:
    """Yield a problem for each name that stands more than once in the list at ``path``."""
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(path, f"{count} are named {name!r}; give each its own name")


def _length_problems(path: str, source: Source, config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if rows are too short for a token to train on: the loss would be 0 for ever."""
    if isinstance(config, ContrastiveRunConfig):
        return
    first, least = ("<BOS><image>", 3) if isinstance(source, MediaSource) else ("<BOS>", 2)
    if isinstance(source, PairSource) and source.train_on == "answer":
        first, least = "<BOS><image> and at least one token of the prompt", 4
    if source.max_tokens < least:
        message = f"{source.max_tokens} leaves nothing to train on: a row begins with {first}; set at least {least}"
        yield Problem(f"{path}.max_tokens", message)


def _filter_problems(path: str, source: Source) -> Iterator[Problem]:
    filters: FilterConfig = source.filters
    for unit, low, high in (
        ("characters", filters.min_characters, filters.max_characters),
        ("words", filters.min_words, filters.max_words),
    ):
        if low is not None and high is not None and low > high:
            yield Problem(f"{path}.min_{unit}", f"{low} is more than filters.max_{unit} {high}")
    for name, value in (("min_side", filters.min_side), ("max_aspect", filters.max_aspect)):
        if source.type == "text" and value is not None:
            yield Problem(f"{path}.{name}", "filters images, and this source has only text; leave it out")


def _crop_problems(path: str, source: MediaSource) -> Iterator[Problem]:
    augment = source.augment
    for name, (low, high) in (("crop_scale", augment.crop_scale), ("crop_ratio", augment.crop_ratio)):
        if low > high:
            yield Problem(f"{path}.{name}", f"goes from {low} to {high}; write the smaller number first")
