"""Test towers during training, and put their scores into the metrics of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.image_geometry import padding_color
from trainer.config.run_config import ContrastiveRunConfig
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.deepspeed_engine.engine import Engine
from trainer.observers.step_observer import StepObserver
from trainer.runtime.distributed import World
from trainer.tasks.contrastive.architecture import image_size
from trainer.tasks.contrastive.captions import caption_tokenizer
from trainer.tasks.contrastive.losses import Features
from trainer.tasks.contrastive.towers import ContrastiveTowers
from trainer.tasks.contrastive.zero_shot import ZeroShot

METRIC = "zero_shot/"


class ZeroShotObserver(StepObserver):
    """Test the towers every ``zero_shot.every`` steps, and after the last step.

    Args:
        config: Settings of the run.
        world: Processes of the run.
    """

    def __init__(self, config: ContrastiveRunConfig, world: World) -> None:
        self._config, self._world = config, world

    def measures(self, step: int) -> bool:
        """Return whether the towers are tested after a step."""
        every = self._config.zero_shot.every
        return step == self._config.training.steps or (every is not None and step % every == 0)

    def measure(self, step: int, engine: Engine) -> Mapping[str, float]:
        """Test the towers; a collective."""
        towers = engine.module
        assert isinstance(towers, ContrastiveTowers)

        def encode(media: Tensor | None, tokens: Tensor | None) -> Tensor:
            return encoded(engine.forward({"media": media, "input_ids": tokens}), is_image=tokens is None)

        with engine.evaluating():
            scores = zero_shot(self._config, towers, self._world).scores(encode)
        return {f"{METRIC}{name}": score for name, score in scores.items()}


def zero_shot_observers(config: ContrastiveRunConfig, world: World) -> tuple[ZeroShotObserver, ...]:
    """Return the observer of a run that has zero-shot tests."""
    has_tests = config.zero_shot.classification or config.zero_shot.retrieval
    return (ZeroShotObserver(config, world),) if has_tests else ()


def zero_shot(config: ContrastiveRunConfig, towers: ContrastiveTowers, world: World) -> ZeroShot:
    """Return the tests of a run, with images as training makes them."""
    color, data = padding_color(towers.mean_color), config.data
    decoder = ImageDecoder(image_size(config), data.image_fit, color, max_pixels=data.max_pixels)
    return ZeroShot(config.zero_shot, caption_tokenizer(config, towers.clip), decoder, world)


def score_towers(config: ContrastiveRunConfig, clip: Any, world: World) -> dict[str, float]:
    """Return the scores of open_clip's model, such as an export; a collective."""
    towers = ContrastiveTowers(clip).to(world.device).eval()

    def encode(media: Tensor | None, tokens: Tensor | None) -> Tensor:
        return encoded(towers(media=media, input_ids=tokens), is_image=tokens is None)

    with torch.no_grad():
        return zero_shot(config, towers, world).scores(encode)


def encoded(output: tuple[Tensor, ...], *, is_image: bool) -> Tensor:
    """Return the features of the input that the towers were given."""
    features = Features(*output)
    return features.image_ND if is_image else features.text_ND
