"""Text only: ``<BOS>text``, which the loader joins to rows of ``samples_per_row`` (``trainer.data.samples.row_builder.join``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainer.config.data_config import FilterConfig
from trainer.data.batch import Row, SampleId
from trainer.data.samples.decode import text_member
from trainer.data.samples.filters import NO_FILTERS, check_metadata, check_text
from trainer.data.samples.row_builder import make_row
from trainer.data.samples.text_encoding import TextEncoding


@dataclass(frozen=True)
class TextBuilder:
    """One ``.txt`` member. Everything is trained: inside a row, the next ``<BOS>`` says that the text is over."""

    encoding: TextEncoding
    max_tokens: int = 256
    filters: FilterConfig = NO_FILTERS

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Raises SampleError: those of the text, of the filters, and special_token."""
        ids = self._ids(members)
        return make_row(ids, [False] * len(ids), (), sample, image_id=None)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Tokens of the row. Raises SampleError like a call."""
        return len(self._ids(members))

    def _ids(self, members: Mapping[str, bytes]) -> list[int]:
        check_metadata(members, self.filters)
        text = text_member(members)
        check_text(text, self.filters)
        return [self.encoding.bos_id, *self.encoding.plain(text)][: self.max_tokens]
