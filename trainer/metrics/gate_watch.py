"""Warn early when the tanh gates of a run will hardly open, so that the model will hardly see its images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from torch import nn

from model.parameters import Gather, trainable_parameters

_log = logging.getLogger(__name__)

SHARE = 0.1  # of the steps, after which the gates are looked at
MIN_STEPS = 100  # shorter runs are trials of the code
HARDLY_OPEN = 0.05  # the gates of trained models reach 0.1 to 1 (paper, appendix A.1.2, figure 6)


class GateWatch:
    """Look at the gates once, after a tenth of the steps, and estimate where they will be after the last one.

    AdamW moves a gate by at most about its learning rate in a step. The estimate therefore continues the movement so
    far in proportion to the learning rates that are still to come, so a long warm-up gives no false alarm.

    Args:
        gather: Makes partitioned parameters readable in whole.
        total_steps: Steps of the run.
        learning_rate_factor: Returns the factor of the learning rate in a step, counted from 0.
    """

    def __init__(self, gather: Gather, total_steps: int, learning_rate_factor: Callable[[int], float]) -> None:
        self._gather, self._total_steps, self._factor = gather, total_steps, learning_rate_factor

    def look(self, done: int, module: nn.Module) -> None:
        """Look at the gates if it is the time. A collective then, because ZeRO-3 may have partitioned them.

        Args:
            done: Steps done.
            module: Module that trains; without gates there is nothing to look at.
        """
        if self._total_steps < MIN_STEPS or done != math.ceil(SHARE * self._total_steps):
            return
        gates = [gate for name, gate in trainable_parameters(module).items() if name.endswith("_gate")]
        passed = sum(map(self._factor, range(done)))
        if not gates or not passed:
            return
        with self._gather(gates):
            moved = max(float(gate.detach().abs().max()) for gate in gates)
        at_end = math.tanh(moved * sum(map(self._factor, range(self._total_steps))) / passed)
        if at_end < HARDLY_OPEN:
            _log.warning(
                "after %d of %d steps the widest gate is open to tanh %.2g, and will be near %.2g at the end: the "
                "model will hardly see its images. Raise optimizer.gate_lr_multiplier or optimizer.lr, or train for "
                "more steps; docs/own_data.md says how to choose them",
                done,
                self._total_steps,
                math.tanh(moved),
                at_end,
            )
