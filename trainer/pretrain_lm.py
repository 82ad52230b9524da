"""Pretrain a small language model on text.

``[deepspeed ... --module] trainer.pretrain_lm CONFIG.yaml [--section.key VALUE ...]``

It resumes by itself from the run folder's newest good checkpoint. The result is ``run_dir/export``:
a Hugging Face folder (weights and tokenizer) that ``model.language_model.name`` takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.run_config import LanguageModelRunConfig
from trainer.entry import Tools, leave, run_training


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 only when the run is complete)."""
    return run_training(LanguageModelRunConfig, argv, _tools)


def _tools() -> Tools[LanguageModelRunConfig]:
    # Imported only now: a wrong configuration is reported before torch and the libraries around it are loaded.
    from trainer.export import export_language_model
    from trainer.tasks.language_model import build_language_model_task

    return Tools(build_language_model_task, export_language_model)


if __name__ == "__main__":
    leave(main())
