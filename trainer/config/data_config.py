"""Settings of the data: sources of samples, filters and augmentations.

Sizes named ``batch_size`` are global (over all ranks), so the number of processes never changes what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from trainer.config.types import (
    FORBID_UNKNOWN_KEYS,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveShare,
    Probability,
)


@dataclass(frozen=True)
class FilterConfig:
    """Select samples by header, text and metadata, before anything is decoded.

    A filtered sample is replaced by another one and counted as ``filtered_<setting>``. None, or an empty list, turns a
    filter off. An interleaved document loses only the images that fail; it is filtered when none is left. Filtered
    samples are not bad samples, so any share may be left out; the samples that are kept are repeated instead.

    Attributes:
        min_side: Shortest side of an image or video frame, in pixels (the paper: 64).
        max_aspect: Largest ratio of the longer side to the shorter (the paper: 3).
        min_characters: Fewest characters of the caption, or of a document's whole text.
        max_characters: Most characters of the caption, or of a document's whole text.
        min_words: Fewest words of the caption, or of a document's whole text.
        max_words: Most words of the caption, or of a document's whole text.
        min_similarity: Lowest value of ``similarity_field``.
        similarity_field: Field of the sample's ``.json`` that holds its image-text similarity.
        languages: Allowed values of ``language_field``.
        language_field: Field of the sample's ``.json`` that holds its language.
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
    """Change each image at random; all frames of a video change alike.

    The draws depend on the sample alone, so a resumed run makes the same changes.

    Attributes:
        horizontal_flip: Probability of mirroring an image.
        crop_scale: Smallest and largest share of the area that a random crop keeps. Crops are off when this and
            ``crop_ratio`` are both (1, 1).
        crop_ratio: Smallest and largest factor on the aspect (width / height) of a random crop.
        brightness: Brightness is multiplied by a factor between 1 - value and 1 + value.
        contrast: Contrast is multiplied by a factor between 1 - value and 1 + value.
        saturation: Saturation is multiplied by a factor between 1 - value and 1 + value.
        hue: Largest rotation of the color circle in either direction, as a share of it.
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
    """Hold the settings that every source shares.

    Attributes:
        name: Name of the source, used in metrics (``loss/<name>``) and in the seed of its order. Another name gives
            another order.
        manifest: File written by ``python -m trainer.index``.
        batch_size: Rows of this source in one step, over all ranks.
        weight: Weight of this source's loss in the step (the paper's lambda).
        micro_batch_size: Rows per rank in one forward pass; None takes ``batch_size / world size``.
        micro_batch_tokens: Tokens per rank in one forward pass, in place of ``micro_batch_size``: the most rows of
            ``max_tokens`` that are no more tokens, and that divide ``batch_size / world size``.
        max_tokens: Longest row in tokens; longer ones are cut.
        packing: Fill each row with as many samples as fit into ``max_tokens``; they do not see one another. False
            gives each sample a row.
        filters: Samples to leave out.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    manifest: Path
    batch_size: Positive
    weight: PositiveFloat = 1.0
    micro_batch_size: Positive | None = None
    micro_batch_tokens: Positive | None = None
    max_tokens: Positive = 256
    packing: bool = False
    filters: FilterConfig = field(default_factory=FilterConfig)

    @property
    def samples_in_row(self) -> int:
        """Samples that make up one row, where rows are not packed."""
        return 1

    @property
    def frames_in_medium(self) -> int:
        """Frames that make up one medium."""
        return 1


@dataclass(frozen=True)
class MediaSource(SourceBase):
    """Hold the settings that all sources with images or videos share.

    Attributes:
        space_prefix_probability: Probability of a single space before the text that follows a medium (the paper: 0.5).
            It is drawn once for each sample.
        augment: Random changes of each image.
        image_tokens: Most patches of the tower for one image or frame, which then keeps its aspect; a ViT-L-14 at 224
            pixels sees 256. None makes a square (``data.image_fit``). Needs one of open_clip's own vision
            transformers, whose position embeddings are interpolated.
    """

    space_prefix_probability: Probability = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    image_tokens: Positive | None = None


@dataclass(frozen=True)
class PairSource(MediaSource):
    """Hold the settings that image-text and video-text pairs share.

    Attributes:
        max_tokens: Longest row in tokens; longer ones are cut (the paper: 32 or 64).
        end_of_sequence: Append ``<EOS>`` after ``<EOC>``, as the paper does, and train on it.
        train_on: "all" trains on the whole text of the ``.txt`` member. "answer" puts the ``.prompt.txt`` member, such
            as a question, between ``<image>`` and the text, and does not train on it.
        answer_prefix: Text between the prompt and the answer with ``train_on: answer``; it is encoded and trained on
            as the beginning of the answer (the paper: a space; OpenFlamingo: nothing).
    """

    max_tokens: Positive = 64
    end_of_sequence: bool = False
    train_on: Literal["all", "answer"] = "all"
    answer_prefix: str = " "


@dataclass(frozen=True)
class ImageTextSource(PairSource):
    """Read pairs of an image and a ``.txt`` member: ``<BOS><image>caption<EOC>`` (paper, appendix A.3.2).

    Attributes:
        type: Kind of source; fixed.
    """

    type: Literal["image_text"] = "image_text"


@dataclass(frozen=True)
class VideoTextSource(PairSource):
    """Read pairs of a video and a ``.txt`` member: ``<BOS><image>caption<EOC>``.

    The video is an mp4, mov, webm, mkv, avi, ts or gif.

    Attributes:
        type: Kind of source; fixed.
        num_frames: Frames taken from each video; they form one medium (the paper: 8). Beyond
            ``model.resampler.num_frames`` the time embeddings are interpolated.
        frames_per_second: Frames taken per second of video (the paper: 1). A video shorter than
            ``num_frames / frames_per_second`` repeats its last frame.
        start: Where the frames begin: at a "random" time, or so that they lie in the "center" of the video.
        max_seconds: Longest video in seconds; longer ones are filtered before they are decoded.
    """

    type: Literal["video_text"] = "video_text"
    num_frames: Positive = 8
    frames_per_second: PositiveFloat = 1.0
    start: Literal["random", "center"] = "random"
    max_seconds: PositiveFloat = 600.0

    @property
    def frames_in_medium(self) -> int:
        """Frames that make up one medium."""
        return self.num_frames


@dataclass(frozen=True)
class InterleavedSource(MediaSource):
    """Read documents in MMC4's format: ``text_list`` and ``image_info`` (paper, appendix A.3.1).

    Attributes:
        type: Kind of source; fixed.
        max_images: Most images of a row; it ends before the next one (the paper: 5). metrics.jsonl counts the images
            that are left out as ``dropped_images/filtered_max_images``.
        subsequence: Where a row begins in its document: at a "random" token (the paper) or at the "start".
        p_next: Probability that the text of a document sees the following image instead of the preceding one (the
            paper: 0.5).
        min_similarity: Lowest ``matched_sim`` of an image, in the unit of the data (MMC4: 0 to 1); images below it are
            dropped. None keeps all.
        max_document_characters: Most characters of a document; the rest of a longer one is cut off before anything
            else. It bounds the time of the tokenizer, which encodes about a million characters a second.
    """

    type: Literal["interleaved"] = "interleaved"
    max_images: Positive = 5
    subsequence: Literal["random", "start"] = "random"
    p_next: Probability = 0.0
    min_similarity: float | None = None
    max_document_characters: Positive = 500_000


@dataclass(frozen=True)
class TextSource(SourceBase):
    """Read text alone (``.txt`` members): ``<BOS>text<BOS>text...``, cut or padded to ``max_tokens``.

    Attributes:
        type: Kind of source; fixed.
        samples_per_row: Consecutive samples that are concatenated to one row.
        kl_weight: Weight of a penalty beside this source's loss: the divergence of the model's predictions from those
            of the language model alone, without adapters, KL(model || language model) in nats a token. 0 has none.
    """

    type: Literal["text"] = "text"
    samples_per_row: Positive = 1
    kl_weight: NonNegativeFloat = 0.0

    @property
    def samples_in_row(self) -> int:
        """Samples that make up one row, where rows are not packed."""
        return self.samples_per_row


Source = Annotated[ImageTextSource | VideoTextSource | InterleavedSource | TextSource, Field(discriminator="type")]


@dataclass(frozen=True)
class DataConfig:
    """Describe the stream. Global batch t is a pure function of (manifests, these settings, seed, t).

    Attributes:
        sources: Sources to train on; every step visits all of them.
        seed: Seed of the order and of every other draw from the data.
        num_lanes: Lanes that a source's order is cut into. Each gives equally many samples to every batch. The number
            of processes must divide it. None takes each source's ``batch_size``.
        shuffle_window: Samples that are permuted together within a lane.
        read_block: Consecutive samples of a shard that are read together.
        num_workers: Loader processes per rank; 0 loads in the training process.
        prefetch: Steps that each loader process prepares ahead.
        image_fit: How an image becomes the tower's square where ``image_tokens`` is not set. "pad" keeps the aspect
            and pads with the mean color (the paper), "crop" resizes the short side and crops the center (open_clip),
            "stretch" ignores the aspect.
        augmentation: Where flips and changes of colors are made (``augment`` of the sources): by the "loader", or on
            the "device", which takes that work off the loader's cores; trainer.pretrain_vision only. Crops are cut by
            the loader before it resizes. The draws of a sample are the same in both places.
        max_pixels: Most pixels of an image or video frame, by its header; larger ones are replaced before they are
            decoded. Decoding takes up to 24 bytes a pixel for an image, and 32 for a video, whose decoder keeps frames.
        ledger: Write ``ledger/rank-N.jsonl``, one line for each sample that an applied step consumed.
        max_bad_fraction: Largest share of bad samples among the last ``bad_window`` samples of a source, over all
            ranks. The run stops above it and names the reasons. Bad replacements count; filtered samples do not.
        bad_window: Samples of a source that ``max_bad_fraction`` looks back on. It starts empty at a resume.
        cache_dir: Folder for blocks of remote shards, shared by all processes of a node. None takes a folder of this
            user in the system's temporary folder.
        cache_bytes: Most bytes in ``cache_dir``; the blocks not used for longest are removed first.
        read_retries: Times that a failed read is repeated, after growing waits: from remote storage, or from a local
            file after an error that passes (a stale handle of NFS, an I/O error).
        read_timeout_seconds: Seconds without a byte after which a read from remote storage has failed.
        read_deadline_seconds: Seconds that a read may take in all, with its repetitions; then the run stops.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    sources: tuple[Source, ...]
    seed: int = 0
    num_lanes: Positive | None = None
    shuffle_window: Positive = 1000
    read_block: Positive = 250
    num_workers: NonNegative = 0
    prefetch: Positive = 2
    image_fit: Literal["pad", "crop", "stretch"] = "pad"
    augmentation: Literal["loader", "device"] = "loader"
    max_pixels: Positive = 178_956_970
    ledger: bool = False
    max_bad_fraction: Probability = 0.1
    bad_window: Positive = 10_000
    cache_dir: Path | None = None
    cache_bytes: Positive = 20_000_000_000
    read_retries: NonNegative = 10
    read_timeout_seconds: PositiveFloat = 30.0
    read_deadline_seconds: PositiveFloat = 300.0
