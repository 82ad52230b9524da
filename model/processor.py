"""Turn text and pixels into the model's input exactly as training does.

``TextLayout`` encodes prompts, ``ProcessorConfig`` describes the pixels. The config is part of every export
(``preprocessor_config.json``), so that inference need not repeat settings of the training run.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from model.image_geometry import ImageFit, ImageGeometry, PatchBudget, padding_color
from model.tokens import FlamingoTokenizer

if TYPE_CHECKING:  # loader processes need only the text, and open_clip takes seconds
    from model.vision_encoder import VisionEncoder

PROCESSOR_FILE = "preprocessor_config.json"
_FORMAT = 1

_log = logging.getLogger(__name__)


class TextError(ValueError):
    """Report a text that cannot be encoded.

    Attributes:
        reason: Kind of the error: "unencodable_text" or "special_token".
        detail: What is wrong with the text.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class PlainTextEncoder:
    """Encode plain text with a copy of a ``tokenizers.Tokenizer`` (``backend_tokenizer`` in transformers).

    It adds and recognizes no special tokens, and neither truncates nor pads.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Copy the tokenizer, which stays as it is."""
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            TextError: unencodable_text: the tokenizer has no token for a part of it, and none for unknown text.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # tokenizers raises Exception itself
            raise TextError("unencodable_text", str(error)) from error

    def __reduce__(self) -> tuple[object, tuple[Tokenizer]]:
        return PlainTextEncoder, (self._tokenizer,)


def refuse_special_ids(ids: Collection[int], special: Collection[int | None]) -> None:
    """Check that plain text was not encoded to special tokens, which some vocabularies hold like any other.

    Raises:
        TextError: special_token.
    """
    found = set(special).intersection(ids)
    if found:
        raise TextError("special_token", f"the text was encoded to the special tokens {found}")


class Special(Enum):
    """Name the special tokens that stand between the texts of a prompt."""

    IMAGE = "image"
    END_OF_CHUNK = "end_of_chunk"


@dataclass(frozen=True)
class TextLayout:
    """Encode a row of texts and special tokens like the row builders of training: each text by itself.

    Tokenizers that mark the beginning of a text (SentencePiece, ``add_prefix_space``) give other ids when a prompt is
    encoded as one string, because they see one beginning instead of several.

    Attributes:
        tokenizer: Tokenizer with the two added tokens.
        space_after_image: Whether every text that follows a medium had a space before it in training
            (``space_prefix_probability: 1``).
    """

    tokenizer: FlamingoTokenizer
    space_after_image: bool = False

    @cached_property
    def _encode(self) -> PlainTextEncoder:
        return PlainTextEncoder(self.tokenizer.tokenizer.backend_tokenizer)

    @cached_property
    def _names(self) -> dict[str, Special]:
        """Special tokens by their characters."""
        ids = {Special.IMAGE: self.tokenizer.image_id, Special.END_OF_CHUNK: self.tokenizer.end_of_chunk_id}
        return {str(self.tokenizer.tokenizer.convert_ids_to_tokens(number)): token for token, number in ids.items()}

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the ids of a user's prompt, in which ``<image>`` and ``<|endofchunk|>`` are special tokens.

        Texts are encoded as they are typed, white space included.

        Raises:
            TextError: A text cannot be encoded.
        """
        longest_first = sorted(self._names, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", prompt)
        return self.encode_parts([self._names.get(piece, piece) for piece in pieces if piece])

    def encode_parts(self, parts: Sequence[str | Special]) -> list[int]:
        """Return the ids of ``<BOS>`` and a row of texts and special tokens; no text becomes a special token.

        Raises:
            TextError: A text cannot be encoded.
        """
        known = self.tokenizer
        ids, before = [known.bos_id], None
        for part in parts:
            if isinstance(part, Special):
                ids.append(known.image_id if part is Special.IMAGE else known.end_of_chunk_id)
            else:
                needs_space = self.space_after_image and before is Special.IMAGE and not part[:1].isspace()
                plain = self._encode(" " + part if needs_space else part)
                special = (known.bos_id, known.eos_id, known.pad_id, known.image_id, known.end_of_chunk_id)
                refuse_special_ids(plain, special)
                ids += plain
            before = part
        return ids


def encode_prompt(tokenizer: FlamingoTokenizer, prompt: str, *, space_after_image: bool = False) -> list[int]:
    """Return the ids of one prompt; ``TextLayout`` explains the arguments, and is faster for many prompts.

    Raises:
        TextError: A text cannot be encoded.
    """
    return TextLayout(tokenizer, space_after_image).encode_prompt(prompt)


@dataclass(frozen=True)
class VideoSampling:
    """Say which frames of a video training took.

    Attributes:
        num_frames: Frames of a video; they form one medium.
        frames_per_second: Frames taken per second of video.
        image_tokens: Most patches of a frame, which then keeps its aspect; None makes squares.
    """

    num_frames: int
    frames_per_second: float
    image_tokens: int | None = None


@dataclass(frozen=True)
class ProcessorConfig:
    """Describe how training turned text and pixels into the model's input (``preprocessor_config.json``).

    Attributes:
        image_size: Side of the tower's square in pixels.
        image_mean: Mean of the input normalization, for pixels in 0..1.
        image_std: Standard deviation of the input normalization.
        patch_size: Side of a patch in pixels, where the tower also takes images of any aspect; else None.
        image_fit: How an image becomes the square.
        image_tokens: Most patches of an image, which then keeps its aspect; None makes squares.
        image_tokens_of_sources: ``image_tokens`` of each source with images, where they differ.
        video: Frames of a video; None where training had no videos.
        space_after_image: Whether every text that followed a medium had a space before it.
    """

    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    patch_size: int | None = None
    image_fit: ImageFit = "pad"
    image_tokens: int | None = None
    image_tokens_of_sources: Mapping[str, int | None] = field(default_factory=dict)
    video: VideoSampling | None = None
    space_after_image: bool = False

    @classmethod
    def of(cls, encoder: VisionEncoder, **settings: Any) -> ProcessorConfig:
        """Describe a vision encoder; ``settings`` are the other attributes."""
        return cls(encoder.image_size, encoder.mean, encoder.std, encoder.patch_size, **settings)

    def geometry(self, image_tokens: int | None = None) -> ImageGeometry:
        """Return the change of size of images.

        Args:
            image_tokens: Most patches of an image, which then keeps its aspect; None makes squares.

        Raises:
            ValueError: ``image_tokens`` is set, but the tower takes squares only.
        """
        if image_tokens is not None and self.patch_size is None:
            raise ValueError(
                f"image_tokens {image_tokens}: the tower takes squares only (its blocks take no attention mask)"
            )
        budget = None if image_tokens is None or self.patch_size is None else PatchBudget(image_tokens, self.patch_size)
        return ImageGeometry(self.image_size, self.image_fit, padding_color(self.image_mean), budget)

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json`` into an export."""
        (folder / PROCESSOR_FILE).write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n")


def read_processor_config(folder: Path) -> ProcessorConfig | None:
    """Read ``preprocessor_config.json`` of an export; None if the export is older than this file.

    Raises:
        ValueError: The file is damaged, or has another format.
    """
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format", None) != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        if values.get("video") is not None:
            values["video"] = VideoSampling(**values["video"])
        values |= {name: tuple(map(float, values[name])) for name in ("image_mean", "image_std")}
        return ProcessorConfig(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}; export the run again (python -m trainer.export)") from error


def load_processor_config(folder: Path, encoder: VisionEncoder) -> ProcessorConfig:
    """Return the processor of an export; one without the file gets that of squares, with a warning.

    Args:
        folder: Export folder.
        encoder: Vision encoder of the export.

    Raises:
        ValueError: The file is damaged, or does not describe the encoder.
    """
    found = read_processor_config(folder)
    if found is None:
        _log.warning(
            "%s has no %s: it is an older export. Images become squares with image_fit pad; if training had other "
            "settings, export the run again (python -m trainer.export), or set image_fit and image_tokens",
            *(folder, PROCESSOR_FILE),
        )
        return ProcessorConfig.of(encoder)
    for name, value, own in (
        ("image_size", found.image_size, encoder.image_size),
        ("patch_size", found.patch_size, encoder.patch_size),
    ):
        if value != own:
            raise ValueError(f"{folder / PROCESSOR_FILE}: {name} is {value}, but the model's tower has {own}")
    return found
