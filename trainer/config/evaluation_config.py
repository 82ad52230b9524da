"""The settings of ``trainer.evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.types import Positive, Probability


@dataclass(frozen=True)
class EvaluationTask:
    """One figure: the share of samples whose caption is generated exactly.

    name: key in the report. manifest, type: where the samples are and what they are.
    image: the caption of this image of each document is generated, after the true captions of those before it.
    image_tokens: as the source's in training: None for squares (``image_fit``), else the most patches of an image.
    control: what is done to the images to see whether they matter: "shuffled" gives each sample another one's target
        image, "first_replaced" gives each document another one's first image, "without_images" gives none.
    minimum, maximum: what the figure must reach, or must not exceed.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    manifest: Path
    type: Literal["image_text", "interleaved"] = "image_text"
    image: Positive = 1
    image_tokens: Positive | None = None
    control: Literal["none", "shuffled", "first_replaced", "without_images"] = "none"
    minimum: Probability | None = None
    maximum: Probability | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """Captions are generated for every task, and compared with the true ones.

    model: an export folder. report: the JSON file to write. tasks: the figures.
    samples: how many of each manifest; None takes all.
    batch_size: captions generated together. max_new_tokens: where a caption is cut. num_beams: 1 is greedy.
    image_fit: as in training. seed: of the shuffling in controls.
    threads: of torch on the CPU; None leaves torch's own choice.
    device, dtype: None takes the GPU where there is one, and the type that the model was trained in.
    show: that many captions of the first task are printed beside the true ones.
    """

    __pydantic_config__ = {"extra": "forbid"}

    model: Path
    report: Path
    tasks: tuple[EvaluationTask, ...]
    samples: Positive | None = None
    batch_size: Positive = 64
    max_new_tokens: Positive = 32
    num_beams: Positive = 1
    image_fit: Literal["pad", "crop", "stretch"] = "pad"
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 0
    show: int = 3
    threads: Positive | None = None
