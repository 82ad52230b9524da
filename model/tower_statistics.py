"""Find the normalization statistics that a vision tower was trained with.

open_clip attaches OpenAI's mean and standard deviation to every model whose weights come from a file, also to families
that were trained with others (SigLIP, PE, MobileCLIP, CLIPA).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import timm

from model.config import VisionEncoderConfig

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation, for pixels in 0..1
OPENAI: Statistics = (tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD))
TIMM = "timm:"
_DESCRIBED = ("local-dir:", "hf-hub:")  # their own config has the statistics

_log = logging.getLogger(__name__)


def tower_statistics(config: VisionEncoderConfig, tower: Any) -> Statistics:
    """Return mean and standard deviation of a tower's input.

    Args:
        config: Settings of the tower.
        tower: open_clip's ``visual``, with the statistics that open_clip attached.

    Raises:
        ValueError: The settings are no statistics; or they are left out, and weights that are published for this
            architecture differ in their statistics.
    """
    if config.mean is not None or config.std is not None:
        return _check_settings(config)
    attached = _attached(tower)
    if not _are_weights_from_a_file(config):
        return _of_tag(config) or attached
    known = published_statistics(config.name)
    if len(known) > 1:
        found = "; ".join(f"mean {_text(mean)}, std {_text(std)} ({', '.join(tags)})" for (mean, std), tags in known)
        raise ValueError(
            f"vision.mean, vision.std: the published weights of {config.name!r} differ in their statistics: {found}. "
            f"vision.pretrained {config.pretrained!r} does not say which it needs: set both"
        )
    if known:
        return known[0][0]
    _log.warning(
        "no published weights of %r are known, so %s gets mean %s and std %s: set vision.mean and vision.std if it was "
        "trained with others",
        *(config.name, config.pretrained, _text(attached[0]), _text(attached[1])),
    )
    return attached


def published_statistics(name: str) -> list[tuple[Statistics, list[str]]]:
    """Return the statistics of all published weights of an architecture, with the tags that use them."""
    found: dict[Statistics, list[str]] = {}
    for tag, settings in _published(name):
        found.setdefault((tuple(settings["mean"]), tuple(settings["std"])), []).append(tag)
    return list(found.items())


def with_statistics_of_old_exports(config: VisionEncoderConfig) -> VisionEncoderConfig:
    """Return the config with the statistics that exports without ``preprocessor_config.json`` were trained with.

    At that time, weights from a file got OpenAI's statistics, and those of timm its default ones.
    """
    if config.mean is not None or not _are_weights_from_a_file(config):
        return config
    mean, std = OPENAI
    if config.name.startswith(TIMM):
        defaults = timm.get_pretrained_cfg(config.name.removeprefix(TIMM))
        mean, std = (tuple(defaults.mean), tuple(defaults.std)) if defaults is not None else (mean, std)
    return replace(config, mean=mean, std=std)


def _published(name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    if name.startswith(TIMM):
        architecture, _, tag = name.removeprefix(TIMM).partition(".")
        tags = [tag] if tag else [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
        names = [f"{architecture}.{one}" for one in tags]
        return [(found, timm.get_pretrained_cfg(found).to_dict()) for found in names or [architecture]]
    name = name.replace("/", "-")  # open_clip takes "ViT-B/32" too
    return [(tag, open_clip.get_pretrained_cfg(name, tag)) for tag in open_clip.list_pretrained_tags_by_model(name)]


def _are_weights_from_a_file(config: VisionEncoderConfig) -> bool:
    """Return whether nothing but the architecture's name tells the statistics; a folder and a repository have them."""
    is_described = config.name.startswith(_DESCRIBED)
    return not is_described and config.pretrained is not None and Path(config.pretrained).is_file()


def _of_tag(config: VisionEncoderConfig) -> Statistics | None:
    """Return the statistics of open_clip's tag, which are not attached to a tower that was built without weights."""
    if config.pretrained is None or config.name.startswith((TIMM, *_DESCRIBED)):
        return None
    settings = open_clip.get_pretrained_cfg(config.name.replace("/", "-"), config.pretrained)
    return (tuple(settings["mean"]), tuple(settings["std"])) if "mean" in settings and "std" in settings else None


def _check_settings(config: VisionEncoderConfig) -> Statistics:
    for name, values in (("vision.mean", config.mean), ("vision.std", config.std)):
        if values is None:
            raise ValueError(f"{name} is not set: set vision.mean and vision.std together")
        if len(values) != 3 or not all(0 <= value <= 1 for value in values) or (name == "vision.std" and 0 in values):
            raise ValueError(
                f"{name} {_text(values)}: set three numbers in 0..1, one for each of red, green and blue (statistics "
                "of pixels in 0..255 are divided by 255)"
            )
    assert config.mean is not None and config.std is not None
    return config.mean, config.std


def _attached(tower: Any) -> Statistics:
    preprocess: dict[str, Any] = getattr(tower, "preprocess_cfg", None) or {}
    if "mean" not in preprocess or "std" not in preprocess:
        raise ValueError("the tower has no preprocess_cfg with mean and std: build it with open_clip.create_model")
    return tuple(preprocess["mean"]), tuple(preprocess["std"])


def _text(values: Iterable[float]) -> str:
    return str([round(value, 4) for value in values])
