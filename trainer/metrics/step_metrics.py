"""What one update did: the record behind metrics.jsonl, the console line, tensorboard and wandb."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.metrics.utilization import Utilization


@dataclass(frozen=True)
class StepMetrics:
    """One update, over the global batch (all ranks).

    step: counted from 1. loss: the weighted sum over sources. losses: each source's own, before its weight.
    grad_norm: before clipping. lr: of this update.
    samples: sequences of each source. tokens: without padding. images: real ones, without the dummies.
    step_seconds: the whole update, waiting for data included. data_seconds: the waiting alone.
    step_skipped: the update was not applied: its gradient was not finite, or ``skip_reason`` says why it was passed over.
    padding: share of the batch's positions that hold no token.
    replaced: samples that could not be used and were replaced, by reason.
    speed: how well the devices were used; None where the update was passed over.
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
    skip_reason: str | None = None
    speed: Utilization | None = None

    @property
    def replaced_samples(self) -> int:
        """Samples that were replaced, for whatever reason."""
        return sum(self.replaced.values())

    def _speeds(self, speed: Utilization) -> dict[str, float | None]:
        return {
            "tokens_per_second": self.tokens / self.step_seconds,
            "samples_per_second": sum(self.samples.values()) / self.step_seconds,
            "images_per_second": self.images / self.step_seconds,
            "tflops": speed.tflops,
            "mfu": speed.mfu,
            "hfu": speed.hfu,
            "device_memory_gib": speed.device_memory,
            "host_memory_gib": speed.host_memory,
        }

    def to_json(self) -> dict[str, Any]:
        """The flat object of metrics.jsonl; numbers that are not finite become null, for JSON has none of them."""
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
            "step_seconds": round(self.step_seconds, 6),
            "data_seconds": round(self.data_seconds, 6),
            "step_skipped": self.step_skipped,
        }
        speeds = {} if self.speed is None else self._speeds(self.speed)
        values |= {key: float(f"{value:.4g}") for key, value in speeds.items() if value is not None}
        if self.skip_reason is not None:
            values["skip_reason"] = self.skip_reason
        return {key: None if _not_finite(value) else value for key, value in values.items()}


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
