"""Settings of the stream: sources of samples, filters and augmentations.

Sizes named ``batch_size`` are global (over all ranks), so that the number of processes never changes what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, Positive, PositiveFloat, PositiveShare, Probability


@dataclass(frozen=True)
class FilterConfig:
    """Samples that are left out, each counted under ``filtered_<setting>`` and replaced like one that is damaged.

    Sizes are read from headers, before anything is decoded. None, or an empty list, leaves nothing out.

    min_side: pixels of the shorter side. max_aspect: longer side over shorter (the paper: 64 and 3). An interleaved
        document loses only the images in question, and is left out with the last of them.
    min_characters, max_characters, min_words, max_words: of the caption, or of a document's whole text.
    min_similarity: of the number ``similarity_field`` in the sample's ``.json``.
    languages: allowed values of ``language_field`` in the sample's ``.json``.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    min_side: Positive | None = None
    max_aspect: Annotated[float, Ge(1)] | None = None
    min_characters: Positive | None = None
    max_characters: Positive | None = None
    min_words: Positive | None = None
    max_words: Positive | None = None
    min_similarity: float | None = None
    similarity_field: str = "similarity"
    languages: tuple[str, ...] = ()
    language_field: str = "language"


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of each image (of all frames of a video alike), drawn from the sample's own randomness.

    horizontal_flip: how often an image is mirrored.
    crop_scale: the least and greatest share of the area that a random crop keeps; crop_ratio: the least and greatest
        factor on its aspect (width / height). Both at (1, 1): no crop.
    brightness, contrast, saturation: each is multiplied by a factor from 1 - value to 1 + value.
    hue: the colour circle is turned by up to this share of it either way.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    horizontal_flip: Probability = 0.0
    crop_scale: tuple[PositiveShare, PositiveShare] = (1.0, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.0


@dataclass(frozen=True)
class SourceBase:
    """What every source of samples has.

    name: used in metrics (``loss/<name>``) and in the order's seed; changing it changes the order.
    manifest: the file that ``python -m trainer.index`` wrote.
    weight: lambda of the paper; the gradient of the update is the weighted sum over all sources.
    batch_size: sequences of this source in one update, over all ranks.
    micro_batch_size: sequences per rank in one forward; None takes ``batch_size / world size`` (one micro-step).
    max_tokens: longer sequences are cut.
    pack: fill each row of ``max_tokens`` with as many samples as fit, which do not see one another; ``batch_size``
        counts these rows. False: one sample a row.
    filters: which samples are left out.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    manifest: Path
    batch_size: Positive
    weight: PositiveFloat = 1.0
    micro_batch_size: Positive | None = None
    max_tokens: Positive = 256
    pack: bool = False
    filters: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True)
class ImageTextSource(SourceBase):
    """``<BOS><image>caption<EOC>``: one image member and one ``.txt`` member a sample (paper, appendix A.3.2).

    max_tokens: the paper uses 32 or 64 for pairs.
    space_prefix_probability: a single space is prepended to the caption that often (the paper: 0.5).
    end_of_sequence: append ``<EOS>`` after ``<EOC>``, as the paper does; it is trained on when it is there.
    augment: random changes of the image.
    image_tokens: None makes a square of each image (``data.image_fit``). A number keeps its aspect instead: it is
        resized to the most patches of the tower, whole ones, that are no more than this (a ViT-L-14 at 224 pixels sees
        256). For open_clip's own vision transformers; their position embeddings are interpolated.
    """

    type: Literal["image_text"] = "image_text"
    max_tokens: Positive = 64
    space_prefix_probability: Probability = 0.0
    end_of_sequence: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    image_tokens: Positive | None = None


@dataclass(frozen=True)
class VideoTextSource(SourceBase):
    """``<BOS><image>caption<EOC>``: one video (``.mp4``, ``.webm``, ``.mkv``, ...) and one ``.txt`` member a sample.

    max_tokens: the paper uses 32 or 64 for pairs.
    frames: taken from each video; one medium has all of them (the paper: 8). ``model.resampler.frames`` is how many
        have a time embedding of their own; more are interpolated.
    frames_per_second: how far apart they are taken (the paper: 1), whatever the video's own rate. A video that is
        shorter than frames / frames_per_second repeats its last frame.
    start: "random" or in the "center" of the video.
    max_seconds: videos whose header says more are skipped before they are decoded.
    space_prefix_probability, end_of_sequence, augment, image_tokens: as for images and their texts (tokens of a frame).
    """

    type: Literal["video_text"] = "video_text"
    max_tokens: Positive = 64
    frames: Positive = 8
    frames_per_second: PositiveFloat = 1.0
    start: Literal["random", "center"] = "random"
    max_seconds: PositiveFloat = 600.0
    space_prefix_probability: Probability = 0.0
    end_of_sequence: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    image_tokens: Positive | None = None


@dataclass(frozen=True)
class InterleavedSource(SourceBase):
    """Documents in MMC4's format: ``text_list`` and ``image_info`` (paper, appendix A.3.1).

    max_images: the first this many images of the window are used (the paper: 5).
    window: "random" start over the document's tokens (the paper) or "start".
    p_next: how often the document's text belongs to the following image instead of the preceding (the paper: 0.5).
    min_similarity: images below are dropped, in the unit of the data's ``matched_sim`` (MMC4: 0 to 1); None keeps all.
    space_prefix_probability: the texts after images get a space in front that often, drawn once a document.
    augment: random changes of each image.
    image_tokens: as for images and their texts.
    """

    type: Literal["interleaved"] = "interleaved"
    max_images: Positive = 5
    window: Literal["random", "start"] = "random"
    p_next: Probability = 0.0
    min_similarity: float | None = None
    space_prefix_probability: Probability = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    image_tokens: Positive | None = None


@dataclass(frozen=True)
class TextSource(SourceBase):
    """Text only (``.txt`` members): ``<BOS>text<BOS>text...``, cut or padded to ``max_tokens``.

    samples_per_row: that many consecutive samples are concatenated to a row.
    """

    type: Literal["text"] = "text"
    samples_per_row: Positive = 1


Source = Annotated[ImageTextSource | VideoTextSource | InterleavedSource | TextSource, Field(discriminator="type")]


@dataclass(frozen=True)
class DataConfig:
    """The stream. Global batch t is a pure function of (manifests, these settings, seed, t).

    sources: what is trained on; every update visits all of them.
    seed: of the order, of windows and of all other draws from the data.
    lanes: into how many lanes a source's order is cut; each gives equally many samples to every batch, and the number
        of processes has to divide it. None takes each source's batch size: one sample a lane and update.
    window: samples permuted together within a lane. block: consecutive samples of a shard read at once.
    workers: loader processes a rank; 0 loads in the training process.
    prefetch: updates that each worker prepares ahead.
    image_fit: how an image becomes the tower's square, where a source has no ``image_tokens``: "pad" keeps the aspect
        and pads with the mean colour (the paper), "crop" resizes the short side and crops the centre (open_clip),
        "stretch" ignores the aspect.
    max_pixels: images, and videos' frames, whose header says more are skipped before they are decoded.
    ledger: write ``ledger/rank-N.jsonl``, one line a sample that an applied step consumed.
    max_bad_fraction: share of a source's last ``bad_window`` samples (over all ranks) that may be bad; one more stops
        the run with the reasons. Substitutes that are bad themselves count too, what filters leave out does not. The
        window starts empty at a resume.
    cache_dir: where blocks of remote shards are kept, a folder on a disk of the node that all its processes share;
        None takes a folder of this user's in the system's temporary folder.
    cache_bytes: the most that cache_dir holds; the blocks that were not used for longest go first.
    read_retries: how often a failed or cut read from remote storage is tried again, after growing waits.
    read_timeout_seconds: how long remote storage may be silent before a read counts as failed.
    read_deadline_seconds: how long a read may take in all, with its repetitions; then the run stops.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    sources: tuple[Source, ...]
    seed: int = 0
    lanes: Positive | None = None
    window: Positive = 1000
    block: Positive = 250
    workers: NonNegative = 0
    prefetch: Positive = 2
    image_fit: Literal["pad", "crop", "stretch"] = "pad"
    max_pixels: Positive = 178_956_970
    ledger: bool = False
    max_bad_fraction: Probability = 0.1
    bad_window: Positive = 10_000
    cache_dir: Path | None = None
    cache_bytes: Positive = 20_000_000_000
    read_retries: NonNegative = 10
    read_timeout_seconds: PositiveFloat = 30.0
    read_deadline_seconds: PositiveFloat = 300.0
