"""Build rows of image-text and video-text pairs (paper, appendix A.3.2).

A pair is ``<BOS><image>caption<EOC>[<EOS>]``, or ``<BOS><image>prompt answer<EOC>[<EOS>]`` with ``train_on: answer``,
which does not train on the prompt. Prompt and answer are encoded by themselves, as inference encodes a prompt and
generates what follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from trainer.config.data_config import PairSource
from trainer.data.batch import Row, SampleId
from trainer.data.errors import SampleError
from trainer.data.samples.filters import accepted_text, check_size, needs_sizes
from trainer.data.samples.rows import make_row
from trainer.data.samples.sample_members import text_member
from trainer.data.samples.text_encoding import TextEncoding

PROMPT_MEMBER = "prompt.txt"


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

    The text, ``<EOC>`` and ``<EOS>`` are trained on. A row longer than ``max_tokens`` loses its end with the
    ``<EOC>``: the model should not learn that a text ends where it was cut.

    Attributes:
        source: Settings of the pairs.
        encoding: Encoder of the texts.
        decoder: Decoder of the images or of the videos.
    """

    source: PairSource
    encoding: TextEncoding
    decoder: MediumDecoder

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Build the row.

        Raises:
            SampleError: From the decoder, the texts or the filters; special_token, filtered_max_tokens.
        """
        before, trained = self._encode(members, rng)
        medium = self.decoder.medium(members, rng)
        untrained = [True] * len(before) + [False] * len(trained)
        return make_row([*before, *trained], untrained, (medium,), sample, image_id=self.encoding.image_id)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Return the number of tokens of the row without decoding the medium.

        Raises:
            SampleError: As for the row, except that a damaged medium is not noticed.
        """
        return sum(map(len, self._encode(members, rng)))

    def _encode(self, members: Mapping[str, bytes], rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Return the ids that are not trained on, and after them those that are."""
        space_draw = rng.random()
        image_id, end_of_chunk_id = self.encoding.layout_ids()
        text = accepted_text(members, self.source.filters)
        longest = self.source.max_tokens
        prefix = " " if space_draw < self.source.space_prefix_probability else ""
        before = [self.encoding.bos_id, image_id]
        if self.source.train_on == "answer":
            before += self.encoding.plain_ids(prefix + text_member(members, PROMPT_MEMBER), longest)
            prefix = self.source.answer_prefix
            if len(before) >= longest:
                detail = f"max_tokens = {longest} leaves no token for the answer after the .{PROMPT_MEMBER}"
                raise SampleError("filtered_max_tokens", detail)
        ends = [end_of_chunk_id, self.encoding.eos_id] if self.source.end_of_sequence else [end_of_chunk_id]
        trained = [*self.encoding.plain_ids(prefix + text, longest), *ends]
        if needs_sizes(self.source.filters):
            check_size(*self.decoder.frame_size(members), self.source.filters)
        before = before[:longest]
        return before, trained[: longest - len(before)]
