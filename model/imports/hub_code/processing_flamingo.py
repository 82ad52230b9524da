"""Turn text, images and videos into the input of a Flamingo, exactly as its training did."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata, load_video

from model.imports.hub_code.modeling_flamingo import find_export
from model.media_inputs import prompt_inputs
from model.pixels import to_rgb
from model.pretrained import describe_export, load_exported_tokenizer
from model.processor import ProcessorConfig, TextLayout, VideoSampling, read_processor_config
from model.tokens import FlamingoTokenizer

VIDEO = "<video>"  # in a text: an <image> token whose medium is the next video
_HUB = ("revision", "cache_dir", "token", "local_files_only")
_UNUSED = {"add_special_tokens", "return_dict", "padding", "padding_side", "sanitize_control_tokens"}


class FlamingoProcessor(ProcessorMixin):
    """Encode texts with interleaved images and videos.

    Attributes:
        layout: Encodes text as training did.
        settings: How training made pixels.
    """

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any,
        tokens: FlamingoTokenizer | None = None,
        settings: ProcessorConfig | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Take the parts that ``from_pretrained`` reads from an export.

        Raises:
            ValueError: A part is missing.
        """
        if tokens is None or settings is None:
            raise ValueError("build a FlamingoProcessor with from_pretrained, from an export")
        super().__init__(tokenizer, chat_template=chat_template)
        self.layout = TextLayout(tokens, settings.space_after_image)
        self.settings = settings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> FlamingoProcessor:
        """Read the processor of an export.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the hub.
            **settings: revision, cache_dir, token and local_files_only of the hub; others are not used.

        Raises:
            ValueError: The folder is no export, or has no preprocessor_config.json.
        """
        hub = {name: settings[name] for name in _HUB if settings.get(name) is not None}
        folder = find_export(pretrained_model_name_or_path, **hub)
        config = describe_export(folder).config
        processor = read_processor_config(folder)
        if processor is None:
            raise ValueError(f"{folder} has no preprocessor_config.json: export the run again")
        if processor.video is None:
            video = VideoSampling(config.resampler.num_frames, 1.0, processor.image_tokens)
            processor = ProcessorConfig(**{**vars(processor), "video": video})
        tokens = load_exported_tokenizer(folder)
        template = folder / "chat_template.jinja"
        chat = template.read_text(encoding="utf-8") if template.is_file() else None
        return cls(tokens.tokenizer, tokens, processor, chat)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "media_grids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> BatchFeature:
        """Encode one text or several, padded at the left.

        Args:
            images: One image, or all images in the order of their ``<image>``, also as a list for each text: Pillow's,
                uint8 arrays [height, width, 3], uint8 tensors [3, height, width], paths or addresses.
            text: Text or texts; ``<image>`` stands for the next image, ``<video>`` for the next video, and
                ``<|endofchunk|>`` ends the text of an example.
            videos: As ``images``: paths, or uint8 frames [frames, height, width, 3], which are all taken.
            audio: Not supported.
            return_tensors: "pt".
            **others: Settings of other processors, of which only those without effect are taken.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L]; with media also ``pixel_values`` and, where media have shapes
            of their own, ``media_grids``.

        Raises:
            ValueError: Numbers of media and places in the text differ, a medium cannot be used, or a setting is not
                supported.
        """
        if audio is not None or return_tensors not in ("pt", None):
            raise ValueError("a Flamingo's processor takes images and videos, and return_tensors='pt' only")
        if unknown := sorted(name for name, value in others.items() if name not in _UNUSED and value is not None):
            raise ValueError(f"a Flamingo's processor does not take {', '.join(unknown)}; leave it out")
        if text is None:
            raise ValueError(f"text is missing: write {self.image_token} where each image belongs")
        texts = [text] if isinstance(text, str) else list(text)
        image_list, video_list = _flatten(images), _flatten(videos)
        media = self._media(texts, image_list, video_list)
        rows = [self.layout.encode_prompt(one.replace(VIDEO, self.image_token)) for one in texts]
        found: dict[str, Any] = self._pad_left(rows)
        if media:
            budgets = [self.settings.image_tokens] * len(image_list) + [self._video.image_tokens] * len(video_list)
            pixels, grids = prompt_inputs(media, self.settings.patch_size, any(budgets))
            found["pixel_values"] = pixels
            if grids is not None:
                found["media_grids"] = torch.tensor(grids)
        return BatchFeature(found, tensor_type=None)

    @property
    def image_token(self) -> str:
        """Token that stands for a medium in a text."""
        tokens = self.layout.tokenizer
        return str(tokens.tokenizer.convert_ids_to_tokens(tokens.image_id))

    @property
    def _video(self) -> VideoSampling:
        assert self.settings.video is not None  # from_pretrained sets it
        return self.settings.video

    def _media(self, texts: Sequence[str], images: list[Any], videos: list[Any]) -> list[Tensor]:
        """Return the media in the order of their places in the texts, each uint8 [frames, 3, height, width]."""
        places = re.findall(f"{re.escape(self.image_token)}|{VIDEO}", "".join(texts))
        for name, token, given in (("images", self.image_token, images), ("videos", VIDEO, videos)):
            if places.count(token) != len(given):
                raise ValueError(
                    f"the texts have {places.count(token)} {token}, but {len(given)} {name} are given: write {token} "
                    f"where each of the {name} belongs"
                )
        next_image, next_video = iter(images), iter(videos)
        return [
            self._image_pixels(next(next_image)) if token == self.image_token else self._video_pixels(next(next_video))
            for token in places
        ]

    def _image_pixels(self, image: Any) -> Tensor:
        return self.settings.geometry(self.settings.image_tokens).resize_and_pad(_pixels(image))[None]

    def _video_pixels(self, video: Any) -> Tensor:
        if isinstance(video, str | Path):
            video, _ = load_video(str(video), sample_indices_fn=self._frame_numbers)
        geometry = self.settings.geometry(self._video.image_tokens)
        return torch.stack([geometry.resize_and_pad(_pixels(frame)) for frame in video])

    def _frame_numbers(self, metadata: VideoMetadata, **_: Any) -> list[int]:
        """Return the frames that a player shows at the times that training takes, in the center of the video."""
        total, rate = metadata.total_num_frames, metadata.fps
        spare = max(0.0, total / rate - self._video.num_frames / self._video.frames_per_second)
        times = [spare / 2 + number / self._video.frames_per_second for number in range(self._video.num_frames)]
        return [min(total - 1, int(time * rate + 1e-6)) for time in times]

    def _pad_left(self, rows: list[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        pad = self.layout.tokenizer.pad_id
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }


def _flatten(media: Any) -> list[Any]:
    """Return media in one list, whether one is given, or a list, or a list for each text."""
    return list(_items(media))


def _items(media: Any) -> Iterator[Any]:
    if media is None:
        return
    if isinstance(media, list | tuple):
        for item in media:
            yield from _items(item)
    else:
        yield media


def _pixels(image: Any) -> Tensor:
    """Return uint8 [3, height, width] of an image.

    Raises:
        ValueError: It is no image, or has pixels of another type.
    """
    if isinstance(image, str | Path):
        image = load_image(str(image))
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(to_rgb(ImageOps.exif_transpose(image)))).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image).permute(2, 0, 1) if image.ndim == 3 else image
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"an image of type {type(image).__name__} and shape {list(getattr(image, 'shape', []))}: give Pillow "
            "images, uint8 arrays [height, width, 3], uint8 tensors [3, height, width] or paths"
        )
    return image
