"""Define the settings of ``trainer.evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.config.run_config import OffloadConfig
from trainer.config.scoring_config import ScoringConfig
from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """Choose how the model is spread over the processes of ``trainer.evaluate``.

    Attributes:
        zero_stage: 0 keeps a whole model in each process; 3 partitions the parameters, for models that fit nowhere
            else.
        offload_param: Offload of the partitioned parameters (stage 3).
        timeout_seconds: Seconds that a collective waits for a missing process.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    zero_stage: Literal[0, 3] = 0
    offload_param: OffloadConfig = field(default_factory=OffloadConfig)
    timeout_seconds: PositiveFloat = 1800.0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(ScoringConfig):
    """Score an exported model.

    Attributes:
        model: Export folder.
        output: Folder of the results: ``report.json``, ``predictions.jsonl``, ``report.html`` and EvalAI's files.
        html: Whether ``report.html`` is written, a page with the table and example prompts.
        image_fit: How an image becomes a square, instead of ``data.image_fit`` of the training run; None keeps that.
        device: Device of torch, such as "cuda:1"; None takes a GPU if there is one. Several processes choose their own.
        dtype: Type of weights and activations; None takes the type in which the model was trained.
        num_examples: Answers of the first task that are printed beside the true ones.
        threads: Threads of torch on the CPU; None leaves the choice to torch.
        deepspeed: How the model is spread over processes.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    model: Path
    output: Path
    html: bool = False
    image_fit: Literal["pad", "crop", "stretch"] | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    num_examples: NonNegative = 3
    threads: Positive | None = None
    deepspeed: PartitionConfig = field(default_factory=PartitionConfig)
