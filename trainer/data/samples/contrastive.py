"""Image-caption pairs for contrastive training: the caption at a fixed context length, nothing to predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config.data_config import FilterConfig
from trainer.data.batch import IGNORED_LABEL, Row, SampleId
from trainer.data.samples.decode import ImageDecoder, image_member, text_member
from trainer.data.samples.filters import NO_FILTERS, check_metadata, check_size, check_text, looks_at_sizes


@dataclass(frozen=True)
class ContrastiveBuilder:
    """tokenize: caption -> int64 [context], padded and with the text tower's own special tokens."""

    tokenize: Callable[[str], Tensor]
    decode_image: ImageDecoder
    filters: FilterConfig = NO_FILTERS

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Raises SampleError: those of the image, of the text and of the filters."""
        input_ids = self._ids(members)
        image = self.decode_image(image_member(members), rng)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        return Row(input_ids, labels, torch.full_like(input_ids, -1), (image[None],), (sample,))

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """The context length. Raises SampleError like a call, but for damaged images."""
        return len(self._ids(members))

    def _ids(self, members: Mapping[str, bytes]) -> Tensor:
        check_metadata(members, self.filters)
        text = text_member(members)
        check_text(text, self.filters)
        if looks_at_sizes(self.filters):
            check_size(*self.decode_image.header_size(image_member(members)), self.filters)
        return self.tokenize(text).to(torch.int64).flatten()
