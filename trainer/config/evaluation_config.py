"""Define the settings of ``trainer.evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, Positive, Probability


@dataclass(frozen=True)
class EvaluationTask:
    """Score one task: the share of samples whose generated caption equals the true one.

    Attributes:
        name: Key of the score in the report.
        manifest: File written by ``python -m trainer.index``.
        type: Kind of samples in the manifest.
        image: Image of each document whose caption is generated, counted from 1. The prompt holds the true captions of
            the images before it.
        image_tokens: Most patches of an image, instead of the ``image_tokens`` of the training run; 0 makes squares
            (``image_fit``), None keeps that of the training run.
        control: Change of the images that shows whether they matter: "shuffled" gives each sample the target image of
            another one, "first_replaced" replaces the first image of each document by another document's,
            "without_images" gives none.
        minimum: Lowest score that passes; None sets no bound.
        maximum: Highest score that passes; None sets no bound.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    manifest: Path
    type: Literal["image_text", "interleaved"] = "image_text"
    image: Positive = 1
    image_tokens: NonNegative | None = None
    control: Literal["none", "shuffled", "first_replaced", "without_images"] = "none"
    minimum: Probability | None = None
    maximum: Probability | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """Generate the captions of every task and compare them with the true ones.

    Attributes:
        model: Export folder.
        report: JSON file to write.
        tasks: Tasks to score.
        num_samples: Samples taken from the beginning of each manifest; None takes all.
        batch_size: Captions generated together.
        max_new_tokens: Longest generated caption in tokens.
        num_beams: Beams of the beam search; 1 is greedy.
        image_fit: How an image becomes a square, instead of ``data.image_fit`` of the training run; None keeps that.
        device: Device of torch, such as "cuda:1"; None takes a GPU if there is one.
        dtype: Type of weights and activations; None takes the type in which the model was trained.
        seed: Seed of the random choices of controls.
        num_examples: Captions of the first task that are printed beside the true ones.
        threads: Threads of torch on the CPU; None leaves the choice to torch.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    model: Path
    report: Path
    tasks: tuple[EvaluationTask, ...]
    num_samples: Positive | None = None
    batch_size: Positive = 64
    max_new_tokens: Positive = 32
    num_beams: Positive = 1
    image_fit: Literal["pad", "crop", "stretch"] | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 0
    num_examples: int = 3
    threads: Positive | None = None
