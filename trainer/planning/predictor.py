"""Predict many configurations of one model; what they share is counted once."""

from __future__ import annotations

from model.flamingo import Flamingo
from trainer.config.run_config import FlamingoRunConfig
from trainer.planning.activation_memory import ActivationMemory
from trainer.planning.prediction import Cluster, Prediction, predict
from trainer.planning.traffic import ModelSizes


class Predictor:
    """Predict a step of configurations that differ in their batches, devices and ZeRO settings.

    Attributes:
        model: Model of all configurations.
    """

    def __init__(self, model: Flamingo, *, exact: bool = False) -> None:
        """Count the parameters of a model on the meta device.

        Args:
            model: The model of all configurations.
            exact: Whether to count the activations of every micro-batch. Otherwise those of one row and two are
                counted, and extrapolated.
        """
        self.model, self._exact = model, exact
        self._sizes = ModelSizes(model)
        self._activations: dict[bool, ActivationMemory] = {}

    def __call__(self, config: FlamingoRunConfig, cluster: Cluster) -> Prediction:
        """Predict a step of ``config`` on ``cluster``; ``predict`` lists the errors."""
        # Linear layers keep other tensors for the backward where their weights are partitioned.
        partitioned = config.deepspeed.zero_stage == 3
        if partitioned not in self._activations:
            self._activations[partitioned] = ActivationMemory(config, self.model, interpolate=not self._exact)
        return predict(config, self.model, cluster, self._activations[partitioned], self._sizes)
