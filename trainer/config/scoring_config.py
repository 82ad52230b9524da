"""Define how tasks are scored, in ``trainer.evaluate`` and during a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.evaluation_tasks import Control, Shots, TaskSettings
from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, Positive, Probability


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Choose what is scored and how, which decides every byte of the report.

    Attributes:
        tasks: Tasks to score.
        shots: Numbers of demonstrations (the paper: 0, 4, 8, 16, 32).
        controls: Controls beside the real prompts. "shuffled_demonstrations" permutes the images of a prompt's
            demonstrations, "exchanged_demonstrations" as the episodes say, "replaced_demonstrations" takes them from
            another query's prompt, "shuffled_query" gives the query another query's image, "blank" a uniform image,
            "no_images" shows no image at all, "language_model_alone" also leaves cross-attention and adapters out.
        seed: Seed of demonstrations, subsets and controls. They depend on it and on the query's id alone.
        prompt_style: Texts of the prompts: "paper", "openflamingo", or "plain" without any words.
        zero_shot_examples: Text-only examples of an open-ended prompt without demonstrations (the paper: 2).
        demonstrations: "random" draws them, "rices" takes those whose images are most similar to the query's, the most
            similar one last.
        rices_cache: Folder of the image features for "rices"; None computes them anew.
        orders: Orders of the demonstrations over which log-likelihoods of ranked answers are averaged (the paper: 6).
        ranking: Whether the "total" log-likelihood of a candidate decides, or its mean "per_token".
        batch_size: Queries answered together.
        max_new_tokens: Longest generated answer in tokens.
        num_beams: Beams of the beam search (the paper: 3); 1 is greedy.
        length_penalty: Exponent of the length by which beam search divides log-likelihoods; 0 takes their sum.
        confidence: Level of the intervals.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    tasks: tuple[TaskSettings, ...]
    shots: tuple[Shots, ...] = (0,)
    controls: tuple[Control, ...] = ()
    seed: int = 0
    prompt_style: Literal["paper", "openflamingo", "plain"] = "paper"
    zero_shot_examples: NonNegative = 2
    demonstrations: Literal["random", "rices"] = "random"
    rices_cache: Path | None = None
    orders: Positive = 1
    ranking: Literal["total", "per_token"] = "total"
    batch_size: Positive = 64
    max_new_tokens: Positive = 32
    num_beams: Positive = 1
    length_penalty: float = 0.0
    confidence: Probability = 0.95


@dataclass(frozen=True, kw_only=True)
class LiveEvaluationConfig(ScoringConfig):
    """Score the model while it trains. metrics.jsonl then has ``eval/<task>/<shots>``.

    Attributes:
        tasks: Tasks to score, as those of ``trainer.evaluate``; without any, there is no evaluation.
        every: Steps between two evaluations; the last step is always followed by one.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    tasks: tuple[TaskSettings, ...] = ()
    every: Positive = 1000
