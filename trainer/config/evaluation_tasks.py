"""Define the tasks of ``trainer.evaluate``, one class for each layout of files.

Files are read as they are published. A task with a ``support`` set draws its demonstrations from it; documents and
episodes bring their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, Positive

Control = Literal[
    "none",
    "shuffled_demonstrations",
    "exchanged_demonstrations",
    "replaced_demonstrations",
    "shuffled_query",
    "blank",
    "no_images",
    "language_model_alone",
]
Shots = Annotated[int, Ge(0), Le(256)]


@dataclass(frozen=True)
class Bound:
    """Require a score; the command ends with exit code 1 if one is missed.

    Attributes:
        shots: Number of demonstrations to which the bound applies; None applies it to all of the task.
        control: Control whose score is meant.
        score: Name of a further score of the task, such as "other"; None takes the main one.
        group: Group of queries, such as "question_type/color"; None takes all queries.
        minimum: Lowest score that passes; None sets no bound.
        maximum: Highest score that passes; None sets no bound.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    shots: NonNegative | None = None
    control: Control = "none"
    score: str | None = None
    group: str | None = None
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class PromptTexts:
    """Write the texts of a prompt instead of those of ``prompt_style``. Each text is encoded by itself.

    Attributes:
        context: Text between the image and the answer; ``{question}`` and ``{text}`` stand for fields of the query.
        answer: Text of a demonstration's answer, with ``{answer}`` in it. What stands before ``{answer}`` also begins
            every candidate that is ranked.
        separator: Text after the ``<|endofchunk|>`` of each demonstration.
        cut: Texts at which a generated answer is cut.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    context: str = ""
    answer: str = "{answer}"
    separator: str = ""
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseTask:
    """Hold the settings of every task.

    Attributes:
        name: Key of the task in the report.
        shots: Numbers of demonstrations, instead of the ``shots`` of all tasks.
        controls: Controls, instead of the ``controls`` of all tasks.
        num_queries: Queries that are drawn at random from the task; None takes all.
        max_new_tokens: Longest generated answer in tokens, instead of that of all tasks.
        prompt: Texts of the prompt, instead of those of ``prompt_style``.
        zero_shot_examples: Text-only examples of a prompt without demonstrations, instead of those of all tasks.
        image_tokens: Most patches of an image, instead of the ``image_tokens`` of the training run; 0 makes squares
            (``image_fit``), None keeps that of the training run.
        bounds: Scores that the task has to reach.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    shots: tuple[Shots, ...] | None = None
    controls: tuple[Control, ...] | None = None
    num_queries: Positive | None = None
    max_new_tokens: Positive | None = None
    prompt: PromptTexts | None = None
    zero_shot_examples: NonNegative | None = None
    image_tokens: NonNegative | None = None
    bounds: tuple[Bound, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CocoTask(BaseTask):
    """Caption images of COCO's layout (COCO, NoCaps); the score is CIDEr.

    Attributes:
        type: Layout of the files; fixed.
        annotations: JSON with ``images`` and ``annotations``.
        images: Folder of the images, to which ``file_name`` is added.
        support_annotations: The same of the training set, for demonstrations.
        support_images: Folder of the training images; None takes ``images``.
    """

    type: Literal["coco"] = "coco"
    annotations: Path
    images: Path
    support_annotations: Path | None = None
    support_images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class KarpathyTask(BaseTask):
    """Caption images of Karpathy's files (``dataset_coco.json``, ``dataset_flickr30k.json``); the score is CIDEr.

    Attributes:
        type: Layout of the files; fixed.
        annotations: JSON with all splits.
        images: Folder of the images, to which ``filepath`` (if there is one) and ``filename`` are added.
        split: Split of the queries.
        support_splits: Splits of the demonstrations.
    """

    type: Literal["karpathy"] = "karpathy"
    annotations: Path
    images: Path
    split: str = "test"
    support_splits: tuple[str, ...] = ("train", "restval")


@dataclass(frozen=True, kw_only=True)
class VqaTask(BaseTask):
    """Answer questions of VQAv2's layout (VQAv2, OK-VQA); the score is the VQA accuracy.

    Attributes:
        type: Layout of the files; fixed.
        questions: JSON with ``questions``.
        annotations: JSON with ``annotations``; None for a test set, which has no score but a file for EvalAI.
        images: Path of an image, with ``{image_id}``, such as ``val2014/COCO_val2014_{image_id:012d}.jpg``.
        support_questions: The same of the training set, for demonstrations.
        support_annotations: Annotations of the training set.
        support_images: Path of a training image; None takes ``images``.
    """

    type: Literal["vqa"] = "vqa"
    questions: Path
    annotations: Path | None = None
    images: Path
    support_questions: Path | None = None
    support_annotations: Path | None = None
    support_images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TextVqaTask(BaseTask):
    """Answer questions of TextVQA; the score is the VQA accuracy.

    Attributes:
        type: Layout of the files; fixed.
        annotations: JSON with ``data``.
        images: Path of an image, with ``{image_id}``, such as ``train_images/{image_id}.jpg``.
        support_annotations: The same of the training set, for demonstrations.
        support_images: Path of a training image; None takes ``images``.
    """

    type: Literal["textvqa"] = "textvqa"
    annotations: Path
    images: Path
    support_annotations: Path | None = None
    support_images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class VizWizTask(BaseTask):
    """Answer questions of VizWiz; the score is the VQA accuracy.

    Attributes:
        type: Layout of the files; fixed.
        annotations: JSON list of questions.
        images: Folder of the images, to which ``image`` is added.
        support_annotations: The same of the training set, for demonstrations.
        support_images: Folder of the training images; None takes ``images``.
    """

    type: Literal["vizwiz"] = "vizwiz"
    annotations: Path
    images: Path
    support_annotations: Path | None = None
    support_images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class GqaTask(BaseTask):
    """Answer questions of GQA; the score is the share of exact answers.

    Attributes:
        type: Layout of the files; fixed.
        questions: JSON of questions by their ids.
        images: Path of an image, with ``{image_id}``, such as ``images/{image_id}.jpg``.
        support_questions: The same of the training set, for demonstrations.
        support_images: Path of a training image; None takes ``images``.
    """

    type: Literal["gqa"] = "gqa"
    questions: Path
    images: Path
    support_questions: Path | None = None
    support_images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ImageFolderTask(BaseTask):
    """Classify images in a folder for each class (ImageNet) by ranking the class names; the score is top-1.

    Attributes:
        type: Layout of the files; fixed.
        images: Folder with a folder of images for each class.
        class_names: JSON of class names by folder, or a text file with a name a line in the order of the sorted
            folders; None takes the folders' names.
        support_images: Folder of the training images, for demonstrations.
        balanced: Whether demonstrations take turns between the classes.
    """

    type: Literal["image_folder"] = "image_folder"
    images: Path
    class_names: Path | None = None
    support_images: Path | None = None
    balanced: bool = False


@dataclass(frozen=True, kw_only=True)
class HatefulMemesTask(BaseTask):
    """Rank "yes" and "no" on Hateful Memes; the score is the ROC-AUC.

    Attributes:
        type: Layout of the files; fixed.
        annotations: JSON lines with ``id``, ``img``, ``label`` and ``text``.
        images: Folder to which ``img`` is added.
        support_annotations: The same of the training set, for demonstrations.
        balanced: Whether demonstrations take turns between the labels.
    """

    type: Literal["hateful_memes"] = "hateful_memes"
    annotations: Path
    images: Path
    support_annotations: Path | None = None
    balanced: bool = True


@dataclass(frozen=True, kw_only=True)
class VideoQaTask(BaseTask):
    """Rank the candidate answers of questions about videos (MSVD-QA, MSRVTT-QA, STAR); the score is top-1.

    Attributes:
        type: Layout of the files; fixed.
        annotations: JSON list with ``question``, ``answer`` and ``video`` or ``video_id``; ``choices`` (texts, or
            objects with ``choice``) are the candidates of a question.
        videos: Path of a video, with ``{video}``.
        answers: Text file with a candidate a line, for questions without ``choices``.
        support_annotations: The same of the training set, for demonstrations.
        support_videos: Path of a training video; None takes ``videos``.
    """

    type: Literal["video_qa"] = "video_qa"
    annotations: Path
    videos: Path
    answers: Path | None = None
    support_annotations: Path | None = None
    support_videos: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ShardsTask(BaseTask):
    """Caption the images of our own shards, or answer their ``.prompt.txt``.

    Attributes:
        type: Layout of the files; fixed.
        manifest: File written by ``python -m trainer.index``.
        samples: Kind of samples in the manifest. Documents bring their demonstrations: the images before ``image``.
        image: Image of each document whose text is generated, counted from 1.
        metric: "exact" is the share of texts that are exactly right, "cider" is CIDEr.
        support_manifest: Manifest of the training set, for demonstrations of pairs.
    """

    type: Literal["shards"] = "shards"
    manifest: Path
    samples: Literal["image_text", "interleaved"] = "image_text"
    image: Positive = 1
    metric: Literal["exact", "cider"] = "exact"
    support_manifest: Path | None = None


@dataclass(frozen=True, kw_only=True)
class EpisodesTask(BaseTask):
    """Answer prompts that bring their own demonstrations; the score is the share of exact answers.

    Attributes:
        type: Layout of the files; fixed.
        episodes: JSON lines with ``id``, ``demonstrations``, ``query`` and ``answers``; docs/evaluation.md has the
            format. A prompt of k shots has the last k demonstrations.
        images: Folder to which the paths of images are added; None takes the folder of ``episodes``.
        stop_texts: Texts at which a generated answer is cut, beside ``<|endofchunk|>``.
    """

    type: Literal["episodes"] = "episodes"
    episodes: Path
    images: Path | None = None
    stop_texts: tuple[str, ...] = ()


TaskSettings = Annotated[
    CocoTask
    | KarpathyTask
    | VqaTask
    | TextVqaTask
    | VizWizTask
    | GqaTask
    | ImageFolderTask
    | HatefulMemesTask
    | VideoQaTask
    | ShardsTask
    | EpisodesTask,
    Field(discriminator="type"),
]
