"""The best checkpoints are those with the lowest loss, or with the highest score of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.checkpoint.retention import kept_steps, last_scores, smoothed_losses
from trainer.config.run_config import CheckpointConfig

SCORES = {2: 0.5, 4: 0.9, 6: 0.7}


def write_metrics(path: Path) -> None:
    """Write six steps whose loss falls; every second one was scored."""
    lines = []
    for step in range(1, 7):
        line = {"step": step, "loss": 10.0 - step, "step_skipped": False}
        lines.append(line | ({"eval/a/0": SCORES[step]} if step in SCORES else {}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')


def test_a_score_decides_where_the_settings_say_so(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics)
    steps = [1, 2, 4, 5, 6]
    scores = last_scores(metrics, "eval/a/0", steps)
    assert scores == {2: 0.5, 4: 0.9, 5: 0.9, 6: 0.7}
    settings = CheckpointConfig(keep_last=1, keep_best=1)
    negative = {step: -score for step, score in scores.items()}
    assert kept_steps(steps, settings, negative) == {5, 6}, "the later one of two equal scores, and the last"
    assert kept_steps(steps, settings, smoothed_losses(metrics, steps)) == {6}
