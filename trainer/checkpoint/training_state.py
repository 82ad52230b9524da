"""Describe the state of a training run without its tensors (``state.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import STATE

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TrainingState:
    """Hold everything that a resume needs except tensors.

    Attributes:
        step: Steps done, skipped ones included; the next step trains on global batch ``step``.
        world_size: Number of processes that wrote the checkpoint; any other number reads its universal form.
        data: State of the data stream (``StepLoader.state``); the stream is a pure function of it and of ``step``.
        frozen: Digest of every frozen tensor by name (``model.parameters``); these tensors are not in the checkpoint.
        model: Configuration of the model, as plain values.
        stability: State of the stability observer (``Stability.state``).
        layout: Settings that the layout of the shards depends on (``Engine.layout``); with other ones, only their
            universal form can be read.
        format_version: Version of the checkpoint format.
    """

    step: int
    world_size: int
    data: Mapping[str, Any]
    frozen: Mapping[str, str]
    model: Mapping[str, Any]
    stability: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``state.json`` holds."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingState:
        """Build the state from the object that ``state.json`` holds.

        Raises:
            CheckpointError: The format has another version, or the fields are not those of this version.
        """
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"checkpoint format {version}, but this trainer reads format {FORMAT_VERSION}")
        try:
            return cls(**value)
        except TypeError as error:
            raise CheckpointError(f"{STATE} does not have the fields of format {FORMAT_VERSION}: {error}") from error
