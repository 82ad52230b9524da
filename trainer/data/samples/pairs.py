"""Image-text and video-text pairs: ``<BOS><image>caption<EOC>[<EOS>]`` (paper, appendix A.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.config.data_config import FilterConfig
from trainer.data.batch import Row, SampleId
from trainer.data.samples.decode import ImageDecoder, image_member, text_member
from trainer.data.samples.filters import NO_FILTERS, check_metadata, check_size, check_text, looks_at_sizes
from trainer.data.samples.row_builder import make_row
from trainer.data.samples.text_encoding import TextEncoding
from trainer.data.samples.video import VideoDecoder, video_member


@dataclass(frozen=True)
class _Caption:
    """The text's side of a pair.

    The caption, ``<EOC>`` and ``<EOS>`` are trained. A row longer than max_tokens loses its end, ``<EOC>`` included:
    the model should not learn that a caption ends where it was cut.
    """

    encoding: TextEncoding
    max_tokens: int
    space_prefix_probability: float
    end_of_sequence: bool
    filters: FilterConfig

    def ids(self, members: Mapping[str, bytes], draw: float) -> list[int]:
        """Token ids of the row; the first two, ``<BOS>`` and ``<image>``, are not trained."""
        image_id, end_of_chunk_id = self.encoding.layout_ids()
        check_metadata(members, self.filters)
        text = text_member(members)
        check_text(text, self.filters)
        prefix = " " if draw < self.space_prefix_probability else ""
        ids = [self.encoding.bos_id, image_id, *self.encoding.plain(prefix + text), end_of_chunk_id]
        if self.end_of_sequence:
            ids.append(self.encoding.eos_id)
        return ids[: self.max_tokens]

    def sequence(self, ids: list[int], medium: Tensor, sample: SampleId) -> Row:
        """The row; medium: uint8 [frames, 3, height, width]."""
        untrained = [position < 2 for position in range(len(ids))]
        return make_row(ids, untrained, (medium,), sample, image_id=self.encoding.image_id)


@dataclass(frozen=True)
class ImageTextBuilder:
    """One image member and one ``.txt`` member."""

    encoding: TextEncoding
    decode_image: ImageDecoder
    max_tokens: int = 64
    space_prefix_probability: float = 0.0
    end_of_sequence: bool = False
    filters: FilterConfig = NO_FILTERS

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Raises SampleError: those of the image, of the text, of the filters, and special_token."""
        ids = self._ids(members, rng)
        image = self.decode_image(image_member(members), rng)
        return self._caption().sequence(ids, image[None], sample)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Tokens of the row, without decoding the image. Raises SampleError like a call, but for damaged images."""
        return len(self._ids(members, rng))

    def _ids(self, members: Mapping[str, bytes], rng: np.random.Generator) -> list[int]:
        ids = self._caption().ids(members, rng.random())
        if looks_at_sizes(self.filters):
            check_size(*self.decode_image.header_size(image_member(members)), self.filters)
        return ids

    def _caption(self) -> _Caption:
        return _Caption(
            self.encoding, self.max_tokens, self.space_prefix_probability, self.end_of_sequence, self.filters
        )


@dataclass(frozen=True)
class VideoTextBuilder:
    """One video member and one ``.txt`` member; all frames are one medium (paper, section 3.1)."""

    encoding: TextEncoding
    decode_video: VideoDecoder
    max_tokens: int = 64
    space_prefix_probability: float = 0.0
    end_of_sequence: bool = False
    filters: FilterConfig = NO_FILTERS

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Raises SampleError: those of the video, of the text, of the filters, and special_token."""
        ids, start_draw = self._ids(members, rng)
        video = self.decode_video(video_member(members), start_draw, self.decode_video.image.draw(rng))
        return self._caption().sequence(ids, video, sample)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Tokens of the row, without decoding the video. Raises SampleError like a call, but for damaged videos."""
        return len(self._ids(members, rng)[0])

    def _ids(self, members: Mapping[str, bytes], rng: np.random.Generator) -> tuple[list[int], float]:
        space_draw, start_draw = rng.random(2)
        ids = self._caption().ids(members, space_draw)
        if looks_at_sizes(self.filters):
            header = self.decode_video.header(video_member(members))
            check_size(header.width, header.height, self.filters)
        return ids, start_draw

    def _caption(self) -> _Caption:
        return _Caption(
            self.encoding, self.max_tokens, self.space_prefix_probability, self.end_of_sequence, self.filters
        )
