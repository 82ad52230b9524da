"""Tell lmms_eval that there is a model ``flamingo``, without importing it yet.

pyproject.toml names ``manifest`` in the group ``lmms_eval.models``, where lmms_eval 0.7 looks for models.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return lmms_eval's description of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("flamingo", simple_class_path="trainer.hub.lmms_eval_model.FlamingoForLmmsEval")
