"""Build rows of image-text and video-text pairs: ``<BOS><image>caption<EOC>[<EOS>]`` (paper, appendix A.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from trainer.config.data_config import PairSource
from trainer.data.batch import Row, SampleId
from trainer.data.samples.filters import accepted_text, check_size, needs_sizes
from trainer.data.samples.rows import make_row
from trainer.data.samples.text_encoding import TextEncoding

_NUM_UNTRAINED = 2  # <BOS> and <image>


class MediumDecoder(Protocol):
    """Decode the only image or video of a sample: ``ImageDecoder`` or ``VideoDecoder``."""

    def medium(self, members: Mapping[str, bytes], rng: np.random.Generator) -> Tensor:
        """Return uint8 [frames, 3, height, width]: one frame of an image, several of a video."""
        ...

    def frame_size(self, members: Mapping[str, bytes]) -> tuple[int, int]:
        """Return width and height in pixels, from the header."""
        ...


@dataclass(frozen=True)
class PairBuilder:
    """Build the row of a ``.txt`` member and an image or a video; all frames are one medium (paper, section 3.1).

    The caption, ``<EOC>`` and ``<EOS>`` are trained on. A row longer than ``max_tokens`` loses its end with the
    ``<EOC>``: the model should not learn that a caption ends where it was cut.

    Attributes:
        source: Settings of the pairs.
        encoding: Encoder of the caption.
        decoder: Decoder of the images or of the videos.
    """

    source: PairSource
    encoding: TextEncoding
    decoder: MediumDecoder

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Build the row.

        Raises:
            SampleError: From the decoder, the text or the filters; special_token.
        """
        ids = self._encode(members, rng)
        medium = self.decoder.medium(members, rng)
        untrained = [position < _NUM_UNTRAINED for position in range(len(ids))]
        return make_row(ids, untrained, (medium,), sample, image_id=self.encoding.image_id)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Return the number of tokens of the row without decoding the medium.

        Raises:
            SampleError: As for the row, except that a damaged medium is not noticed.
        """
        return len(self._encode(members, rng))

    def _encode(self, members: Mapping[str, bytes], rng: np.random.Generator) -> list[int]:
        space_draw = rng.random()
        image_id, end_of_chunk_id = self.encoding.layout_ids()
        text = accepted_text(members, self.source.filters)
        prefix = " " if space_draw < self.source.space_prefix_probability else ""
        text_ids = self.encoding.plain_ids(prefix + text, self.source.max_tokens)
        ids = [self.encoding.bos_id, image_id, *text_ids, end_of_chunk_id]
        if self.source.end_of_sequence:
            ids.append(self.encoding.eos_id)
        if needs_sizes(self.source.filters):
            check_size(*self.decoder.frame_size(members), self.source.filters)
        return ids[: self.source.max_tokens]
