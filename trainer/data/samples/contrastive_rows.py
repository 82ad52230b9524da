"""Build rows of image-text pairs for contrastive training: a caption of fixed length, no labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config.data_config import ImageTextSource
from trainer.data.batch import IGNORED_LABEL, Row, SampleId
from trainer.data.samples.filters import accepted_text, check_size, needs_sizes
from trainer.data.samples.image_decoder import ImageDecoder

_MOST_CHARACTERS = 50_000  # of a caption; contexts have at most a few hundred tokens, and the tokenizers are slow


@dataclass(frozen=True)
class ContrastiveBuilder:
    """Build the row of an image and its caption.

    Attributes:
        source: Settings of the pairs.
        tokenize: Caption -> int64 [context length], padded and with the text tower's own special tokens.
        decoder: Decoder of the images.
        augments_on_device: Whether flips and colors are left to the device.
    """

    source: ImageTextSource
    tokenize: Callable[[str], Tensor]
    decoder: ImageDecoder
    augments_on_device: bool = False

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Build the row.

        Raises:
            SampleError: From the image, the text or the filters.
        """
        input_ids = self._encode(members)
        labels, media_index = torch.full_like(input_ids, IGNORED_LABEL), torch.full_like(input_ids, -1)
        if self.augments_on_device:
            medium, changes = self.decoder.without_colors(members, rng)
            return Row(input_ids, labels, media_index, (medium,), (sample,), device_changes=(changes,))
        return Row(input_ids, labels, media_index, (self.decoder.medium(members, rng),), (sample,))

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Return the context length.

        Raises:
            SampleError: As for the row, except that a damaged image is not noticed.
        """
        return len(self._encode(members))

    def _encode(self, members: Mapping[str, bytes]) -> Tensor:
        text = accepted_text(members, self.source.filters)
        if needs_sizes(self.source.filters):
            check_size(*self.decoder.frame_size(members), self.source.filters)
        return self.tokenize(text[:_MOST_CHARACTERS]).to(torch.int64).flatten()
