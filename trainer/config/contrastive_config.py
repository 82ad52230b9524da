"""Define the settings that only contrastive pretraining of an image tower has."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from trainer.config.types import FORBID_UNKNOWN_KEYS, Positive, PositiveFloat


@dataclass(frozen=True)
class ContrastiveLossConfig:
    """Choose the loss that compares the images with the captions of a step.

    Attributes:
        kind: "softmax" is CLIP's cross-entropy in both directions (the paper); "sigmoid" is SigLIP's loss, which judges
            each pair of image and caption alone.
        label_smoothing: Share of the target that is spread evenly over all captions of a row, the masked ones left out
            (the paper: 0.1); "softmax" only.
        max_logit_scale: Limit of the inverse temperature, which is learned.
        rows_per_chunk: Rows of a process whose logits are in memory at a time; it changes memory and speed, not the
            gradient.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    max_logit_scale: PositiveFloat = 100.0
    rows_per_chunk: Positive = 1024


@dataclass(frozen=True)
class ClipConfig:
    """Limit the gradient of one tower. Adaptive clipping comes first where both are set.

    Attributes:
        adaptive: Largest ratio of the gradient's norm to the weight's, for each output unit (Brock et al. 2021; the
            paper: 0.01 for its NFNet). None does not limit it.
        norm: Norm to which the gradient of the whole tower is clipped (the paper: 10 for its BERT). None does not clip.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    adaptive: PositiveFloat | None = None
    norm: PositiveFloat | None = None


@dataclass(frozen=True)
class TowerClipConfig:
    """Clip the gradient of each tower by itself, in place of ``optimizer.clip_grad_norm``.

    Attributes:
        image: The image tower with its projection.
        text: The text tower with its projection, and the temperature.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    image: ClipConfig = field(default_factory=ClipConfig)
    text: ClipConfig = field(default_factory=ClipConfig)


@dataclass(frozen=True)
class ClassificationConfig:
    """Classify the images of a folder by the captions of their classes.

    Attributes:
        name: Name of the test, used in its results.
        folder: Folder with one folder of images for each class (the layout of ImageNet).
        templates: Captions of a class; ``{}`` stands for its name. The features of all captions are averaged.
        class_names: JSON file that maps the folder of a class to its name; None takes the folder's own name, with
            spaces for underscores.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    folder: Path
    templates: tuple[str, ...] = ("a photo of a {}.",)
    class_names: Path | None = None


@dataclass(frozen=True)
class RetrievalConfig:
    """Find the captions of an image among all captions, and the image of a caption among all images.

    Attributes:
        name: Name of the test, used in its results.
        captions: JSON file: COCO's ``captions_*.json``, or Karpathy's ``dataset_*.json`` (Flickr30k, COCO), whose test
            split is taken.
        images: Folder of the images that the file names.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    captions: Path
    images: Path


@dataclass(frozen=True)
class ZeroShotConfig:
    """Test the towers on data that they were not trained on.

    Attributes:
        every: Steps between two tests during training; None tests after the last step alone.
        batch_size: Images or captions of a process in one forward pass.
        classification: Tests by classes.
        retrieval: Tests by captions.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    every: Positive | None = None
    batch_size: Positive = 64
    classification: tuple[ClassificationConfig, ...] = ()
    retrieval: tuple[RetrievalConfig, ...] = ()
