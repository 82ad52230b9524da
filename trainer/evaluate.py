"""Score an exported model: ``python -m trainer.evaluate CONFIG.yaml [--key VALUE ...]``.

Prints a table, writes the report, and exits with 1 if a score misses its bound.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.config.command_line import parse_arguments
from trainer.config.evaluation_config import EvaluationConfig

if TYPE_CHECKING:  # loads torch; a wrong configuration is reported before that
    from trainer.evaluation.exact_captions import Score


def main(argv: Sequence[str] | None = None) -> int:
    """Score every task and return the exit code."""
    config = parse_arguments(EvaluationConfig, argv)

    from trainer.runtime.files import write_json

    try:
        scores = _scores(config)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"trainer.evaluate: {error}", file=sys.stderr)
        return 1
    _print_table(scores)
    for truth, generated in scores[0].captions[: config.num_examples]:
        print(f"  {truth!r} -> {generated!r}")
    config.report.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.report, {score.task.name: score.value for score in scores})
    missed = [score.task.name for score in scores if not score.met]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _scores(config: EvaluationConfig) -> list[Score]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from model.pretrained import from_pretrained, load_exported_tokenizer
    from model.processor import TextLayout, load_processor_config
    from trainer.data.samples.prompt_media import override, prompt_image_decoder
    from trainer.evaluation.exact_captions import evaluate_task

    disable_progress_bar()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = from_pretrained(config.model, dtype=config.dtype, device=device)
    tokenizer = load_exported_tokenizer(config.model)
    trained = load_processor_config(config.model, model.vision_encoder)
    layout = TextLayout(tokenizer, trained.space_after_image)
    # All decoders before the first task: a wrong image_tokens is an error at the start.
    decoders = [
        prompt_image_decoder(
            override(
                trained,
                config.model,
                image_fit=("image_fit", config.image_fit),
                image_tokens=(f"tasks.{number}.image_tokens", task.image_tokens),
            )
        )
        for number, task in enumerate(config.tasks)
    ]
    return [
        evaluate_task(model, layout, task, config, decoder)
        for task, decoder in zip(config.tasks, decoders, strict=True)
    ]


def _print_table(scores: Sequence[Score]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "exact", "samples", "target", "")
    for score in scores:
        low, high = score.task.minimum, score.task.maximum
        bounds = [f">= {low:.2f}" if low is not None else "", f"<= {high:.2f}" if high is not None else ""]
        verdict = "ok" if score.met else "MISSED"
        target = " ".join(bounds).strip()
        table.add_row(score.task.name, f"{score.value:.3f}", str(score.num_samples), target, verdict)
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
