"""Score an exported model: ``python -m trainer.evaluate CONFIG.yaml [--key VALUE ...]``.

Prints a table, writes the report, and exits with 1 when a figure misses its bound.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    config = parse_arguments(EvaluationConfig, argv)

    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers.utils.logging import disable_progress_bar

    from model.pretrained import from_pretrained, tokenizer_of
    from trainer.data.samples.prompt_images import decoder_of
    from trainer.evaluation.exact_captions import evaluate_task
    from trainer.runtime.files import write_json

    disable_progress_bar()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = from_pretrained(config.model, dtype=config.dtype, device=device)
        tokenizer = tokenizer_of(config.model)
        decoders = [decoder_of(model.vision_encoder, config.image_fit, task.image_tokens) for task in config.tasks]
        scores = [
            evaluate_task(model, tokenizer, task, config, decoder)
            for task, decoder in zip(config.tasks, decoders, strict=True)
        ]
    except (OSError, ValueError, RuntimeError) as error:
        print(f"trainer.evaluate: {error}", file=sys.stderr)
        return 1

    table = Table("figure", "exact", "samples", "wanted", "")
    for score in scores:
        low, high = score.task.minimum, score.task.maximum
        wanted = " ".join([f">= {low:.2f}" if low is not None else "", f"<= {high:.2f}" if high is not None else ""])
        row = (
            score.task.name,
            f"{score.value:.3f}",
            str(score.samples),
            wanted.strip(),
            "ok" if score.met else "MISSED",
        )
        table.add_row(*row)
    Console(width=100).print(table)
    for truth, found in scores[0].captions[: config.show]:
        print(f"  {truth!r} -> {found!r}")
    config.report.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.report, {score.task.name: score.value for score in scores})
    missed = [score.task.name for score in scores if not score.met]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
