"""Pretrain a small language model on text.

``[deepspeed ... --module] trainer.pretrain_lm CONFIG.yaml [--section.key VALUE ...]``

It resumes from the newest good checkpoint in the run folder. The result is ``run_dir/export``:
a Hugging Face folder (weights and tokenizer) that ``model.language_model.name`` takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.run_config import LanguageModelRunConfig
from trainer.entry import Recipe, exit_now, run_training


def main(argv: Sequence[str] | None = None) -> int:
    """Train and return the exit code, which is 0 only when the run is complete."""
    return run_training(LanguageModelRunConfig, argv, _recipe)


def _recipe() -> Recipe[LanguageModelRunConfig]:
    # Imported here, so that a wrong configuration is reported before torch is loaded.
    from trainer.export import export_language_model
    from trainer.tasks.language_model import build_language_model_task

    return Recipe(build_language_model_task, export_language_model)


if __name__ == "__main__":
    exit_now(main())
