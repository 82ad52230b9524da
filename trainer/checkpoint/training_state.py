"""What a checkpoint says about itself beside DeepSpeed's shards, and where everything lies.

::

    checkpoints/latest                      the name of the newest complete checkpoint, moved atomically
    checkpoints/step-00000010/
        *_model_states.pt, *_optim_states.pt   DeepSpeed's shards: trainable weights and optimizer, one set a rank
        offloaded_tensors/rankNN/              the optimizer's part of that rank where it is offloaded to NVMe
        rng-rank-00000.safetensors             random states of that rank
        state.json                             TrainingState
        config.yaml                            the run's settings as they were resolved
        manifest.json                          size and sha256 of every file above; written last: without it the
                                               checkpoint does not exist
        universal/                             the same tensors in DeepSpeed's universal format, for other numbers of
                                               processes; made when first needed, with a manifest.json of its own
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.runtime.files import canonical_json

FORMAT_VERSION = 2
LATEST, MANIFEST, STATE, CONFIG = "latest", "manifest.json", "state.json", "config.yaml"
UNIVERSAL = "universal"
OFFLOADED = "offloaded_tensors"  # DeepSpeed's name
_TAG = re.compile(r"step-(\d{8,})")


class CheckpointError(TrainerError):
    """A checkpoint that cannot be used, or not for this run; the message says what to do."""


@dataclass(frozen=True)
class TrainingState:
    """Everything but tensors.

    step: updates done, skipped ones included; the next update is global batch ``step``.
    world_size: processes that wrote it; another number reads its universal form.
    data: what ``trainer.data.stream.loader.data_state`` says; the stream is a pure function of it and of ``step``.
    frozen: a digest of every frozen tensor by name (``model.parameters``); the tensors are not in the checkpoint.
    model: the model's configuration, as plain values.
    stability: what ``trainer.resilience.stability`` goes on from.
    """

    step: int
    world_size: int
    data: Mapping[str, Any]
    frozen: Mapping[str, str]
    model: Mapping[str, Any]
    stability: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """As it stands in state.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingState:
        """From state.json. Raises: CheckpointError for another format version."""
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"checkpoint format {version}, but this trainer reads format {FORMAT_VERSION}")
        try:
            return cls(**value)
        except TypeError as error:
            raise CheckpointError(f"{STATE} does not hold what format {FORMAT_VERSION} has: {error}") from error


def tag_of(step: int) -> str:
    """The folder's name for a step."""
    return f"step-{step:08d}"


def step_of(tag: str) -> int | None:
    """The step of a folder's name, or None if the folder is no checkpoint."""
    match = _TAG.fullmatch(tag)
    return int(match.group(1)) if match else None


def entries_checksum(entries: Mapping[str, Any]) -> str:
    """The manifest's checksum of itself."""
    return hashlib.sha256(canonical_json(entries).encode()).hexdigest()


def rng_file(folder: Path, rank: int) -> Path:
    """Where a rank keeps its random states."""
    return folder / f"rng-rank-{rank:05d}.safetensors"
