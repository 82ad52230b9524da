"""Write easy-VQA as webdataset shards for training and in VQAv2's layout for evaluation.

    python launch_scripts/prepare_easy_vqa.py --output DIR [--seed 0]

The data come from the package easy-vqa (MIT), which contains 4,000 training and 1,000 test images of 64x64 pixels, and
48,248 questions. Each image shows one shape of one color; there are 13 different answers.

    train/text          texts about shapes, for the language model
    train/captions      images with "a teal circle"; the images whose questions say both color and shape
    train/answers       images with a prompt ("Question: what shape is in the image? Answer:") and its answer
    {validation,test}/  questions.json, annotations.json and images/, in VQAv2's layout

Validation is the last of the training images, which nothing trains on. Captions come from the training questions alone;
only the evaluation reads test questions. ``question_type`` in the annotations is "color", "shape" or, for yes/no
questions, "present" or "absent": whether the thing asked for is in the image.

The command takes seconds, writes the same bytes for the same seed, and does nothing if it has finished with the same
settings before.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs as a file, from any folder

from launch_scripts.easy_vqa_language import COLORS, SHAPES, facts, prompt_of, question_type, texts
from launch_scripts.prepared_data import Members, Parts, parse_arguments, prepare_once, write_shards

VERSION = 3
_NUM_ANNOTATORS = 10  # VQAv2 has ten answers a question; here they are equal


@dataclass(frozen=True)
class Settings:
    """Sizes of the data. A change of any of them writes the data again.

    Attributes:
        seed: Seed of all random choices.
        validation_images: Training images that are kept for validation.
        texts: Samples in train/text.
        questions: Questions that are used of each part; None takes all.
        version: Version of this script's output.
    """

    seed: int = 0
    validation_images: int = 400
    texts: int = 40_000
    questions: int | None = None
    version: int = VERSION


@dataclass(frozen=True)
class Question:
    """Hold one question.

    Attributes:
        text: The question.
        answer: Its answer.
        image: Number of its image.
    """

    text: str
    answer: str
    image: int


@dataclass(frozen=True)
class Part:
    """Hold the questions of train, validation or test.

    Attributes:
        images: Folder with ``NUMBER.png``.
        questions: Questions, in the order of the package.
    """

    images: Path
    questions: tuple[Question, ...]

    def by_image(self) -> dict[int, list[Question]]:
        """Return the questions of each image."""
        found: dict[int, list[Question]] = {}
        for question in self.questions:
            found.setdefault(question.image, []).append(question)
        return found

    def png(self, image: int) -> bytes:
        """Return an image."""
        return self.image_path(image).read_bytes()

    def image_path(self, image: int) -> Path:
        """Return the file of an image."""
        return self.images / f"{image}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(__doc__.split("\n")[0], argv)
    return prepare(arguments.output, Settings(seed=arguments.seed))


def prepare(output: Path, settings: Settings) -> int:
    """Write all folders below ``output`` and return an exit code."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        print(
            "the package easy-vqa is missing; install it: pip install 'flamingo-trainer[quickstart]'", file=sys.stderr
        )
        return 1
    return prepare_once(output, settings, partial(_writers, output, settings, Path(spec.origin).parent / "data"))


def split(package_data: Path, settings: Settings) -> dict[str, Part]:
    """Read the questions of train, validation and test."""
    images = {part: package_data / part / "images" for part in ("train", "test")}
    questions = {
        part: [Question(*row) for row in json.loads((package_data / part / "questions.json").read_text())]
        for part in images
    }
    first_held_out = 1 + max(question.image for question in questions["train"]) - settings.validation_images
    train = [question for question in questions["train"] if question.image < first_held_out]
    validation = [question for question in questions["train"] if question.image >= first_held_out]
    chosen = {"train": train, "validation": validation, "test": questions["test"]}
    return {
        name: Part(images["test" if name == "test" else "train"], tuple(part[: settings.questions]))
        for name, part in chosen.items()
    }


def _writers(output: Path, settings: Settings, package_data: Path) -> Parts:
    parts = split(package_data, settings)
    train = parts["train"]

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng([settings.seed, number])

    asked = [question.text for question in train.questions]
    samples: dict[str, Iterator[Members]] = {
        "train/text": ({"txt": text.encode()} for text in texts(rng(0), settings.texts, asked)),
        "train/captions": captions(rng(1), train),
        "train/answers": answers(rng(2), train),
    }
    for name, made in samples.items():
        yield name, partial(write_shards, output / name, made)
    for name in ("validation", "test"):
        yield name, partial(write_questions, output / name, parts[name])


def captions(rng: np.random.Generator, part: Part) -> Iterator[Members]:
    """Yield image-text samples: ``png``, ``txt``."""
    questions = part.by_image()
    images = list(questions)
    for image in (images[place] for place in rng.permutation(len(images))):
        color, shape = facts([(question.text, question.answer) for question in questions[image]])
        if color is not None and shape is not None:
            yield {"png": part.png(image), "txt": f"a {color} {shape}".encode()}


def answers(rng: np.random.Generator, part: Part) -> Iterator[Members]:
    """Yield samples of one question: ``png``, ``prompt.txt``, ``txt``."""
    for place in rng.permutation(len(part.questions)):
        question = part.questions[place]
        prompt, answer = prompt_of(question.text).encode(), question.answer.encode()
        yield {"png": part.png(question.image), "prompt.txt": prompt, "txt": answer}


def write_questions(folder: Path, part: Part) -> str:
    """Write a part in VQAv2's layout and describe it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, of_image in part.by_image().items():
        shutil.copy(part.image_path(image), folder / "images")
        for number, question in enumerate(of_image):
            ids = {"question_id": 1000 * image + number, "image_id": image}
            questions.append({**ids, "question": question.text})
            given = {"answer": question.answer, "answer_confidence": "yes"}
            annotations.append(
                {
                    **ids,
                    "question_type": question_type(question.text, question.answer),
                    "answer_type": "other" if question.answer in (*COLORS, *SHAPES) else "yes/no",
                    "multiple_choice_answer": question.answer,
                    "answers": [{**given, "answer_id": 1 + annotator} for annotator in range(_NUM_ANNOTATORS)],
                }
            )
    header = {"info": {"description": "easy-VQA"}, "data_type": "easy-vqa", "data_subtype": folder.name}
    (folder / "questions.json").write_text(json.dumps({**header, "task_type": "Open-Ended", "questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({**header, "annotations": annotations}))
    return f"{len(questions):,} questions"


if __name__ == "__main__":
    sys.exit(main())
