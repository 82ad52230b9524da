"""Image-caption pairs for contrastive training: the caption at a fixed context length, nothing to predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import IGNORED_LABEL, SampleId, Sequence
from trainer.data.decode import ImageDecoder, image_member, text_member


@dataclass(frozen=True)
class ContrastiveBuilder:
    """tokenize: caption -> int64 [context], padded and with the text tower's own special tokens."""

    tokenize: Callable[[str], Tensor]
    decode_image: ImageDecoder

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Sequence:
        """Raises SampleError: those of the image and of the text."""
        input_ids = self.tokenize(text_member(members)).to(torch.int64).flatten()
        image = self.decode_image(image_member(members))
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        return Sequence(input_ids, labels, torch.full_like(input_ids, -1), (image[None],), (sample,))
