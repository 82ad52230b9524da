"""Define how a run measures what its language model forgets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config.types import FORBID_UNKNOWN_KEYS, Positive


@dataclass(frozen=True)
class ForgettingConfig:
    """Measure how well the language model predicts held-out text: ``forgetting/bits_per_byte`` in metrics.jsonl.

    Attributes:
        manifest: Manifest of held-out texts, as of a text source; None measures nothing.
        num_documents: Documents that are measured, spread evenly over the manifest; always the same ones.
        every: Steps between two measurements. There is one before the first step, and one after the last.
        max_tokens: Tokens that the model sees together. Longer documents are measured in pieces.
        batch_size: Pieces of each rank in one forward pass.
        tasks: Tasks of lm_eval that score the language model alone, without cross-attention, at the same steps:
            ``forgetting/TASK/METRIC``. They need the extra ``lm_eval``.
        task_folder: Folder with YAML files of tasks, as lm_eval's ``--include_path``, the only ones known then; None
            knows lm_eval's own tasks, most of which read their data from the hub.
        task_limit: Most documents of a task, the first ones; None takes all.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    manifest: Path | None = None
    num_documents: Positive = 100
    every: Positive = 1000
    max_tokens: Positive = 256
    batch_size: Positive = 4
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: Positive | None = None
