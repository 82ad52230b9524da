"""Describe a Flamingo to transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class FlamingoHubConfig(PreTrainedConfig):
    """Hold what ``config.json`` of an export says.

    Attributes:
        model: Settings of the model, as nested dicts of ``FlamingoConfig``.
        tokens: Ids of the special tokens.
        seed: Seed of the parts that were not loaded from anywhere.
        format: Version of the export's layout.
        frozen_fingerprint: Digest over all frozen weights.
    """

    model_type = "flamingo"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        tokens: dict[str, int] | None = None,
        seed: int = 0,
        format: int = 1,  # noqa: A002  the name in config.json
        frozen_fingerprint: str = "",
        **settings: Any,
    ) -> None:
        """Take the values of ``config.json``; ``settings`` are those of every model of transformers."""
        self.model = model or {}
        self.tokens = tokens or {}
        self.seed = seed
        self.format = format
        self.frozen_fingerprint = frozen_fingerprint
        super().__init__(**settings)
