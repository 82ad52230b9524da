"""Build rows of text alone: ``<BOS>text``. The loader joins ``samples_per_row`` of them to one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainer.config.data_config import SourceBase
from trainer.data.batch import Row, SampleId
from trainer.data.samples.filters import accepted_text
from trainer.data.samples.rows import make_row
from trainer.data.samples.text_encoding import TextEncoding


@dataclass(frozen=True)
class TextBuilder:
    """Build the row of a ``.txt`` member; every token is trained on.

    Within a joined row, the next ``<BOS>`` tells the model that a text has ended.

    Attributes:
        source: Settings of the texts.
        encoding: Encoder of the texts.
    """

    source: SourceBase
    encoding: TextEncoding

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Build the row.

        Raises:
            SampleError: From the text or the filters; special_token.
        """
        ids = self._encode(members)
        return make_row(ids, [False] * len(ids), (), sample, image_id=None)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Return the number of tokens of the row.

        Raises:
            SampleError: As for the row.
        """
        return len(self._encode(members))

    def _encode(self, members: Mapping[str, bytes]) -> list[int]:
        text = accepted_text(members, self.source.filters)
        return [self.encoding.bos_id, *self.encoding.plain_ids(text, self.source.max_tokens)][: self.source.max_tokens]
