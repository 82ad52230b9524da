"""Score a model by the share of held-out images whose generated caption equals the true one.

Each example is a prompt of images with their true captions, which ends with the image to caption. A control changes
only the images: the score that it costs is what the model gained from seeing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import Tensor

from model.flamingo import Flamingo
from model.generation import generate
from model.processor import Special, TextLayout
from trainer.config.evaluation_config import EvaluationConfig, EvaluationTask
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.mmc4_document import image_bytes, parse_document
from trainer.data.samples.prompt_media import model_media
from trainer.data.samples.sample_members import decode_json, image_member, text_member
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader


@dataclass(frozen=True)
class Example:
    """Hold the images and captions of one prompt.

    Attributes:
        images: uint8 [1, 3, height, width] each; the last one is to be captioned.
        captions: True caption of each image.
    """

    images: tuple[Tensor, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Hold the result of a task.

    Attributes:
        task: Task that was scored.
        value: Share of exact captions, 0 to 1.
        num_samples: Number of captions that were generated.
        captions: (true, generated) caption of each sample.
    """

    task: EvaluationTask
    value: float
    num_samples: int
    captions: tuple[tuple[str, str], ...]

    @property
    def met(self) -> bool:
        """Whether the score lies within the bounds of the task."""
        low, high = self.task.minimum, self.task.maximum
        return (low is None or self.value >= low) and (high is None or self.value <= high)


def read_examples(task: EvaluationTask, decoder: ImageDecoder, num_samples: int | None) -> list[Example]:
    """Read the examples of a task, shard by shard.

    Args:
        task: Task with the manifest of its samples.
        decoder: Decodes the images.
        num_samples: Number of samples to take; None takes all.

    Raises:
        ShardError: A shard cannot be read.
        ValueError: There are no samples, or one cannot be used. Leaving it out would make scores incomparable.
    """
    reader = ShardReader(load_manifest(task.manifest))
    read = _read_pair if task.type == "image_text" else _read_document
    examples = []
    try:
        for key, members in islice(_members(reader), num_samples):
            try:
                examples.append(read(key, members, decoder, task.image))
            except SampleError as error:
                raise ValueError(f"{task.manifest}: sample {key!r} cannot be used: {error}") from error
    finally:
        reader.close()
    if not examples:
        raise ValueError(f"{task.manifest} has no samples")
    return examples


def _members(reader: ShardReader) -> Iterator[tuple[str, dict[str, bytes]]]:
    for shard, count in enumerate(reader.manifest.samples):
        for index in range(int(count)):
            yield reader.read(shard, index)


def _read_pair(key: str, members: dict[str, bytes], decoder: ImageDecoder, image: int) -> Example:
    return Example((decoder(image_member(members))[None],), (text_member(members).strip(),))


def _read_document(key: str, members: dict[str, bytes], decoder: ImageDecoder, image: int) -> Example:
    document = parse_document(decode_json(members.get("json", b"")))
    if len(document.images) < image:
        raise SampleError("no_images", f"it has {len(document.images)} images, but the task captions image {image}")
    placed = document.images[:image]
    images = tuple(decoder(image_bytes(one, members, key))[None] for one in placed)
    return Example(images, tuple(document.sentences[one.sentence].strip() for one in placed))


def apply_control(examples: Sequence[Example], task: EvaluationTask, seed: int) -> list[Example]:
    """Return the examples with the images that the task's control prescribes and unchanged captions."""
    if task.control in ("none", "without_images"):
        return list(examples)
    place = -1 if task.control == "shuffled" else 0
    # The examples form one cycle in random order, and each takes the image of its neighbor; none keeps its own.
    order = np.random.default_rng(seed).permutation(len(examples))
    donor = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    controlled = []
    for number, example in enumerate(examples):
        images = list(example.images)
        images[place] = examples[donor[number]].images[place]
        controlled.append(replace(example, images=tuple(images)))
    return controlled


def prompt_of(example: Example) -> list[str | Special]:
    """Return the prompt ``<image>caption<EOC>...<image>``, up to the caption to generate."""
    prompt: list[str | Special] = []
    for caption in example.captions[:-1]:
        prompt += [Special.IMAGE, caption, Special.END_OF_CHUNK]
    return [*prompt, Special.IMAGE]


def evaluate_task(
    model: Flamingo, layout: TextLayout, task: EvaluationTask, config: EvaluationConfig, decoder: ImageDecoder
) -> Score:
    """Generate every caption of a task and return the share of exact ones; errors as ``read_examples``."""
    examples = apply_control(read_examples(task, decoder, config.num_samples), task, config.seed)
    captions = []
    for start in range(0, len(examples), config.batch_size):
        batch = examples[start : start + config.batch_size]
        with_images = task.control != "without_images"
        images = [image for example in batch for image in example.images] if with_images else []
        media, media_grids = model_media(images, decoder)
        generated = generate(
            model,
            [layout.encode_parts(prompt_of(example)) for example in batch],
            media,
            [len(example.images) if with_images else 0 for example in batch],
            max_new_tokens=config.max_new_tokens,
            media_grids=media_grids,
            num_beams=config.num_beams,
            blind=not with_images,
        )
        captions += [layout.tokenizer.decode(ids).strip() for ids in generated]
    truth = [example.captions[-1] for example in examples]
    exact = sum(found == true for found, true in zip(captions, truth, strict=True))
    return Score(task, exact / len(examples), len(examples), tuple(zip(truth, captions, strict=True)))
