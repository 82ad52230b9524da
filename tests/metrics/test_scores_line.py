"""Test the console's line of what was measured after a step."""

from __future__ import annotations

from trainer.metrics.sinks import scores_line
from trainer.metrics.step_metrics import StepMetrics


def metrics(**measured: float) -> StepMetrics:
    named = {name.replace("__", "/"): value for name, value in measured.items()}
    return StepMetrics(3, 1.0, {}, 1.0, 0.1, {}, 10, 1.0, 0.0, False, measured=named)


def test_scores_are_printed_and_values_of_each_step_are_not() -> None:
    found = scores_line(metrics(eval__coco=0.25, forgetting__difference=0.0, kl__text=1.0, grad_norm__vision=2.0), 100)
    assert found == "step   3/100  eval/coco 0.2500  forgetting/difference 0.0000"
    assert scores_line(metrics(kl__text=1.0), 100) == "" == scores_line(metrics(), 100)
