"""Describe one step: the record behind metrics.jsonl, the console line, tensorboard and wandb."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.metrics.utilization import Utilization


@dataclass(frozen=True)
class StepMetrics:
    """Hold the metrics of one step, over the global batch (all ranks).

    Attributes:
        step: Number of the step, counted from 1.
        loss: Weighted sum of the sources' losses.
        losses: Loss of each source, before its weight.
        grad_norm: Norm of the gradient, before clipping.
        lr: Learning rate of this step.
        samples: Rows of each source.
        tokens: Tokens without padding.
        step_seconds: Duration of the whole step, including the wait for data.
        data_seconds: Duration of the wait for data.
        step_skipped: Whether the step was not applied, because its gradient was not finite or for ``skip_reason``.
        images: Images without the dummies of batches that have none.
        padding: Share of the positions in the batch that hold no token.
        replaced: Number of replaced samples by reason.
        dropped_images: Number of images that documents lost, by reason.
        skip_reason: Reason why the data of the step were not trained on; None if they were.
        utilization: Use of the devices; None if the data were not trained on.
        measured: What was measured after this step, such as scores of an evaluation, by name.
    """

    step: int
    loss: float
    losses: Mapping[str, float]
    grad_norm: float
    lr: float
    samples: Mapping[str, int]
    tokens: int
    step_seconds: float
    data_seconds: float
    step_skipped: bool
    images: int = 0
    padding: float = 0.0
    replaced: Mapping[str, int] = field(default_factory=dict)
    dropped_images: Mapping[str, int] = field(default_factory=dict)
    skip_reason: str | None = None
    utilization: Utilization | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def replaced_samples(self) -> int:
        """Number of replaced samples, over all reasons."""
        return sum(self.replaced.values())

    def _measured(self, used: Utilization) -> dict[str, float | None]:
        return {
            "tokens_per_second": self.tokens / self.step_seconds,
            "samples_per_second": sum(self.samples.values()) / self.step_seconds,
            "images_per_second": self.images / self.step_seconds,
            "tflops": used.tflops,
            "mfu": used.mfu,
            "hfu": used.hfu,
            "device_memory_gib": used.device_memory_gib,
            "host_memory_gib": used.host_memory_gib,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of metrics.jsonl; numbers that are not finite become null, since JSON lacks them."""
        values: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            **{f"loss/{name}": value for name, value in self.losses.items()},
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            **{f"samples/{name}": value for name, value in self.samples.items()},
            "tokens": self.tokens,
            "padding": round(self.padding, 6),
            "images": self.images,
            "replaced_samples": self.replaced_samples,
            **{f"replaced_samples/{reason}": count for reason, count in sorted(self.replaced.items())},
            **{f"dropped_images/{reason}": count for reason, count in sorted(self.dropped_images.items())},
            "step_seconds": round(self.step_seconds, 6),
            "data_seconds": round(self.data_seconds, 6),
            "step_skipped": self.step_skipped,
        }
        measured = {} if self.utilization is None else self._measured(self.utilization)
        values |= {key: float(f"{value:.4g}") for key, value in measured.items() if value is not None}
        values |= self.measured
        if self.skip_reason is not None:
            values["skip_reason"] = self.skip_reason
        return {key: None if _not_finite(value) else value for key, value in values.items()}


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
