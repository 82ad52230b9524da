"""Decode the media of prompts as training decoded them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from model.media_inputs import media_inputs
from model.processor import ProcessorConfig
from trainer.data.errors import DataError
from trainer.data.samples.prompt_media import Media, prompt_image_decoder, prompt_video_decoder
from trainer.evaluation.query import BlankMedium, Medium

_KEPT = 512  # decoded media; demonstrations come back in the prompts of other shots and controls


class MediaDecoder:
    """Decode media to the model's input, and keep the last ones."""

    def __init__(self, processor: ProcessorConfig) -> None:
        """Create a decoder of images, and of videos where the processor has settings of them.

        Raises:
            ValueError: ``image_tokens`` is set, but the tower takes squares only.
        """
        self._image = prompt_image_decoder(processor)
        self._video = None if processor.video is None else prompt_video_decoder(processor)
        self._kept: OrderedDict[Medium, Tensor] = OrderedDict()

    def decode(self, medium: Medium) -> Tensor:
        """Return one medium, uint8 [F, 3, Y, X].

        Raises:
            ValueError: The medium cannot be read or decoded; the error names it.
        """
        if medium in self._kept:
            self._kept.move_to_end(medium)
            return self._kept[medium]
        if isinstance(medium, BlankMedium):
            decoded = self._blank()
        else:
            try:
                data = medium.read()
                if medium.kind == "image":
                    decoded = self._image(data)[None]
                else:
                    assert self._video is not None, "the task has videos, so the processor has settings of them"
                    decoded = self._video(data, 0.0)
            except (DataError, OSError) as error:
                raise ValueError(f"{medium.name}: {error}") from error
        self._kept[medium] = decoded
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return decoded

    def stack(self, media: Sequence[Medium]) -> Media:
        """Return ``media`` and ``media_grids`` of the model; both are None if there are no media.

        Raises:
            ValueError: A medium cannot be read or decoded; the error names it.
        """
        if not media:
            return None, None
        decoded = [self.decode(medium) for medium in media]
        longest = max(len(one) for one in decoded)  # a blank image stands for a video too
        decoded = [one.expand(longest, -1, -1, -1) if len(one) == 1 else one for one in decoded]
        return media_inputs(decoded, None if self._image.budget is None else self._image.budget.patch_size)

    def _blank(self) -> Tensor:
        geometry = self._image
        color = torch.tensor(geometry.mean_color, dtype=torch.uint8)[:, None, None]
        return geometry.fit_pixels(color.repeat(1, geometry.size, geometry.size))[None]
