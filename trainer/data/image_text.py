"""Image-text pairs: ``<BOS><image>caption<EOC>[<EOS>]`` (paper, appendix A.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainer.data.batch import SampleId, Sequence
from trainer.data.decode import ImageDecoder, image_member, text_member
from trainer.data.sequences import make_sequence
from trainer.data.text_encoding import TextEncoding


@dataclass(frozen=True)
class ImageTextBuilder:
    """One image member and one ``.txt`` member.

    The caption, ``<EOC>`` and ``<EOS>`` are trained. A row longer than max_tokens loses its end, ``<EOC>`` included:
    the model should not learn that a caption ends where it was cut.
    """

    encoding: TextEncoding
    decode_image: ImageDecoder
    max_tokens: int = 64
    space_prefix_probability: float = 0.0
    end_of_sequence: bool = False

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Sequence:
        """Raises SampleError: those of the image, of the text, and special_token."""
        image_id, end_of_chunk_id = self.encoding.layout_ids()
        prefix = " " if rng.random() < self.space_prefix_probability else ""
        caption = self.encoding.plain(prefix + text_member(members))
        image = self.decode_image(image_member(members))
        ids = [self.encoding.bos_id, image_id, *caption, end_of_chunk_id]
        if self.end_of_sequence:
            ids.append(self.encoding.eos_id)
        ids = ids[: self.max_tokens]
        untrained = [position < 2 for position in range(len(ids))]
        return make_sequence(ids, untrained, (image[None],), sample, image_id=image_id)
