"""Name the files of a checkpoint.

::

    checkpoints/latest                      the name of the newest complete checkpoint, replaced atomically
    checkpoints/step-00000010/
        *_model_states.pt, *_optim_states.pt   DeepSpeed's shards: trainable weights and optimizer, one set a rank
        offloaded_tensors/rankNN/              the rank's part of the optimizer where it is offloaded to NVMe
        rng-rank-00000.safetensors             random states of the rank
        state.json                             TrainingState
        config.yaml                            the run's settings as resolved
        manifest.json                          size and sha256 of every file above; written last: a folder without it
                                               is not a checkpoint
        universal/                             the same tensors in DeepSpeed's universal format, which any number of
                                               processes can read; written when first needed, with its own manifest.json
"""

from __future__ import annotations

import re
from pathlib import Path

LATEST, MANIFEST, STATE, CONFIG = "latest", "manifest.json", "state.json", "config.yaml"
UNIVERSAL = "universal"
OFFLOADED = "offloaded_tensors"  # DeepSpeed chose this name
_TAG = re.compile(r"step-(\d{8,})")


def tag_of(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:08d}"


def step_of(tag: str) -> int | None:
    """Return the step of a folder's name; None if the folder is not a checkpoint."""
    match = _TAG.fullmatch(tag)
    return int(match.group(1)) if match else None


def rng_file(checkpoint: Path, rank: int) -> Path:
    """Return the file with the random states of a rank."""
    return checkpoint / f"rng-rank-{rank:05d}.safetensors"
