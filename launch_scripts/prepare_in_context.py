"""Write the data of the in-context demonstration: webdataset shards for training, episodes for the evaluation.

    python launch_scripts/prepare_in_context.py --output DIR [--seed 0]

A picture shows one or two handwritten digits of scikit-learn, 32x32 pixels. The digit images and the pairs of digits
are split as in ``prepare_digits.py``.

    train/text       pages of text alone, for the language model: numbers stand where pictures will stand
    train/pictures   single pictures with "three and five", for the tower
    train/captions   documents of 3 to 7 pictures, all captioned in one random style
    train/episodes   documents of 4 to 8 pictures, each class with an invented word of its own

    {validation,test}/binding.jsonl          two classes, single digits; the words are in no training data
    {validation,test}/binding_pairs.jsonl    the same; the classes are pairs of digits that no training picture shows
    {validation,test}/styles.jsonl           captions in styles of words that no training caption has
    {validation,test}/*_text.jsonl           the same episodes with numbers in place of the pictures
    {validation,test}/images/                pictures of digit images that training never showed

Training assigns words to numbers at random in each document, so only the demonstrations of a prompt tell what a picture
is called. An episode holds eight demonstrations and the query. Its last k demonstrations are the prompt with k shots;
in a binding episode they show both classes equally often.

The command takes less than a minute, writes the same bytes for the same seed, and does nothing if it has finished with
the same settings before.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs as a file, from any folder

from launch_scripts import prepare_digits
from launch_scripts.digit_sentences import WORDS, sentence
from launch_scripts.in_context_language import (
    HELD_OUT_STYLE_WORDS,
    PAIRS,
    SINGLES,
    STYLE_WORDS,
    SYLLABLES,
    Line,
    Number,
    binding_page,
    caption_page,
    distinct_words,
    invented_words,
    pick,
    pick_several,
    random_style,
    written,
)
from launch_scripts.prepared_data import Members, Parts, parse_arguments, prepare_once, write_shards

VERSION = 2
NUM_DEMONSTRATIONS = 8

# Shares of the kinds of pages in train/text.
_REPEATED_WORDS = 0.1
_BINDING = 0.5
_CAPTIONS = 0.3


@dataclass(frozen=True)
class Settings:
    """Sizes of the data. A change of any of them writes the data again.

    Attributes:
        seed: Seed of all random choices.
        text: Samples in train/text.
        pictures: Samples in train/pictures.
        captions: Documents in train/captions.
        episodes: Documents in train/episodes.
        evaluation: Episodes in each file of validation and test.
        version: Version of this script's output.
    """

    seed: int = 0
    text: int = 36_000
    pictures: int = 24_000
    captions: int = 6_000
    episodes: int = 6_000
    evaluation: int = 300
    version: int = VERSION


@dataclass(frozen=True)
class Episode:
    """Hold the demonstrations and the query of a prompt.

    Attributes:
        demonstrations: Numbers with their labels.
        query: Number to be named.
        answer: Label of the query.
        exchange: For each demonstration, the place of the one whose picture it gets when the classes are exchanged.
        other: Label of the query after the exchange; None where there are no classes.
    """

    demonstrations: tuple[Line, ...]
    query: Number
    answer: str
    exchange: tuple[int, ...] | None = None
    other: str | None = None


class Pictures:
    """Draw pictures of numbers from the digit images of one split.

    Attributes:
        images: float32 [1797, 1, 8, 8], all digit images, from 0 to 1.
    """

    def __init__(self, split: prepare_digits.Split, *, distort: bool) -> None:
        self.images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        self._digits, self._distort = split.digits, distort

    def choose(self, rng: np.random.Generator, number: Number) -> list[int]:
        """Draw an image of each digit of a number; return their indices."""
        return [int(rng.choice(self._digits[digit])) for digit in number]

    def draw(self, rng: np.random.Generator, chosen: Sequence[Sequence[int]]) -> list[bytes]:
        """Return a PNG for each number, of which ``chosen`` holds the indices of its digit images."""
        side, half = prepare_digits.SIZE, prepare_digits.SIZE // 2
        images = self.images[[index for indices in chosen for index in indices]]
        if self._distort:
            maps = prepare_digits.distortions(rng, len(images))
            grid = F.affine_grid(maps, [len(images), 1, half, half], align_corners=False)
            large = F.grid_sample(images, grid, align_corners=False)[:, 0]
        else:
            large = F.interpolate(images, (half, half), mode="bilinear", align_corners=False)[:, 0]
        pngs, first = [], 0
        for indices in chosen:
            row = torch.cat(list(large[first : first + len(indices)]), 1)
            first += len(indices)
            canvas, left = torch.zeros(side, side), (side - row.shape[1]) // 2
            canvas[half // 2 : half // 2 + half, left : left + row.shape[1]] = row
            pngs.append(prepare_digits.png((canvas * 255).round().clamp(0, 255).to(torch.uint8).numpy()))
        return pngs

    def draw_numbers(self, rng: np.random.Generator, numbers: Sequence[Number]) -> list[bytes]:
        """Return a PNG for each number, of images drawn at random."""
        return self.draw(rng, [self.choose(rng, number) for number in numbers])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(__doc__.split("\n")[0], argv)
    return prepare(arguments.output, Settings(seed=arguments.seed))


def prepare(output: Path, settings: Settings) -> int:
    """Write all files below ``output`` and return an exit code."""
    return prepare_once(output, settings, partial(_writers, output, settings))


def _writers(output: Path, settings: Settings) -> Parts:
    splits = prepare_digits.split(prepare_digits.Settings(seed=settings.seed))
    train = Pictures(splits["train"], distort=True)
    numbers = SINGLES * 8 + splits["train"].pairs  # as many singles as pairs
    words = invented_words()
    sources: dict[str, tuple[int, Callable[[np.random.Generator], Members]]] = {
        "text": (settings.text, lambda rng: {"txt": text_page(rng, words.train).encode()}),
        "pictures": (settings.pictures, lambda rng: picture(rng, train, pick(rng, numbers))),
        "captions": (
            settings.captions,
            lambda rng: document(rng, train, caption_page(rng, numbers, STYLE_WORDS, int(rng.integers(3, 8)))),
        ),
        "episodes": (
            settings.episodes,
            # A fourth of the words: the pictures must not teach what the words of the evaluation mean.
            lambda rng: document(
                rng, train, binding_page(rng, numbers, words.train[::4], int(rng.integers(4, 9)), max_classes=3)
            ),
        ),
    }
    for place, (name, (count, make)) in enumerate(sources.items()):
        rng = np.random.default_rng([settings.seed, place])
        samples = (make(rng) for _ in range(count))
        yield f"train/{name}", partial(write_shards, output / "train" / name, samples)
    for place, name in enumerate(("validation", "test")):
        rng = np.random.default_rng([settings.seed, 100 + place])
        held_out_words = words.validation if name == "validation" else words.test
        episodes = {
            "binding": partial(binding_episode, rng, SINGLES, held_out_words),
            "binding_pairs": partial(binding_episode, rng, splits[name].pairs, held_out_words),
            "styles": partial(style_episode, rng, splits["train"].pairs),
        }
        pictures = Pictures(splits[name], distort=False)
        yield name, partial(write_episodes, output / name, rng, pictures, episodes, settings.evaluation)


def text_page(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Draw a page for the language model, which is to learn from it to look up what the page says."""
    draw = rng.random()
    numbers = [*SINGLES, *pick_several(rng, PAIRS, 10)]
    if draw < _REPEATED_WORDS:  # nothing teaches looking things up faster
        few = [pick(rng, [*map(written, (*SINGLES, *PAIRS)), *SYLLABLES]) for _ in range(rng.integers(6, 24))]
        return "".join(few * 10)
    if draw < _REPEATED_WORDS + _BINDING:
        return _text(binding_page(rng, numbers, words, 20, max_classes=7))
    if draw < _REPEATED_WORDS + _BINDING + _CAPTIONS:
        return _text(caption_page(rng, numbers, STYLE_WORDS + HELD_OUT_STYLE_WORDS, 9))
    return "\n".join(sentence(rng) for _ in range(5))


def _text(lines: Sequence[Line]) -> str:
    return "\n".join(map(str, lines))


def picture(rng: np.random.Generator, pictures: Pictures, number: Number) -> Members:
    """Return an image-text sample: ``png``, ``txt``."""
    [png] = pictures.draw_numbers(rng, [number])
    return {"png": png, "txt": " and ".join(WORDS[digit] for digit in number).encode()}


def document(rng: np.random.Generator, pictures: Pictures, lines: Sequence[Line]) -> Members:
    """Return an interleaved sample: ``json`` (MMC4) and ``0.png``, ``1.png``, ..."""
    pngs = pictures.draw_numbers(rng, [line.number for line in lines])
    places = range(len(lines))
    info = [{"image_name": f"{place}.png", "matched_text_index": place, "matched_sim": 1.0} for place in places]
    content = {"text_list": [line.label for line in lines], "image_info": info}
    return {"json": json.dumps(content).encode(), **{f"{place}.png": png for place, png in enumerate(pngs)}}


def binding_episode(rng: np.random.Generator, numbers: Sequence[Number], words: Sequence[str]) -> Episode:
    """Draw an episode of two classes; each two demonstrations from the end show both, in random order."""
    right, wrong = (
        Line(*both) for both in zip(pick_several(rng, numbers, 2), distinct_words(rng, words, 2), strict=True)
    )
    lines: list[Line] = []
    exchange: list[int] = []
    for first in range(0, NUM_DEMONSTRATIONS, 2):
        lines += pick_several(rng, [right, wrong], 2)
        exchange += [first + 1, first]
    return Episode(tuple(lines), right.number, right.label, tuple(exchange), wrong.label)


def style_episode(rng: np.random.Generator, numbers: Sequence[Number]) -> Episode:
    """Draw an episode whose captions share a style of held-out words."""
    style = random_style(rng, HELD_OUT_STYLE_WORDS)
    *shown, query = pick_several(rng, numbers, NUM_DEMONSTRATIONS + 1)
    return Episode(tuple(Line(number, style.caption(number)) for number in shown), query, style.caption(query))


def write_episodes(
    folder: Path,
    rng: np.random.Generator,
    pictures: Pictures,
    kinds: Mapping[str, Callable[[], Episode]],
    count: int,
) -> str:
    """Write the files of episodes of one split, with pictures and as text alone, and describe them."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    for kind, make in kinds.items():
        episodes = [make() for _ in range(count)]
        with_pictures, as_text = [], []
        for number, episode in enumerate(episodes):
            name = f"{kind}-{number:03d}"
            shown = [*(line.number for line in episode.demonstrations), episode.query]
            files = []
            for chosen in (pictures.choose(rng, one) for one in shown):
                files.append("images/" + "-".join(map(str, chosen)) + ".png")
                path = folder / files[-1]
                if not path.exists():
                    path.write_bytes(pictures.draw(rng, [chosen])[0])
            with_pictures.append(record_of(name, episode, files))
            as_text.append(text_record_of(name, episode))
        for suffix, records in (("", with_pictures), ("_text", as_text)):
            lines = [json.dumps(record) + "\n" for record in records]
            (folder / f"{kind}{suffix}.jsonl").write_text("".join(lines))
    return f"{len(kinds)} x {count} episodes"


def record_of(name: str, episode: Episode, files: Sequence[str]) -> dict[str, Any]:
    """Return one line of a file of episodes (docs/evaluation.md).

    Args:
        name: Id of the episode.
        episode: The episode.
        files: Picture of each demonstration and, last, of the query.
    """
    labels = [line.label for line in episode.demonstrations]
    demonstrations = [{"image": file, "text": label} for file, label in zip(files[:-1], labels, strict=True)]
    record: dict[str, Any] = {"id": name, "demonstrations": demonstrations, "query": {"image": files[-1]}}
    record["answers"] = [episode.answer]
    if episode.exchange is not None:
        record |= {"exchange": list(episode.exchange), "other": episode.other}
    return record


def text_record_of(name: str, episode: Episode) -> dict[str, Any]:
    """Return the line of the same episode as text alone, as the language model's pages have it."""
    demonstrations = [{"before": written(number), "text": f"{label}\n"} for number, label in episode.demonstrations]
    query = {"before": written(episode.query)}
    return {"id": name, "demonstrations": demonstrations, "query": query, "answers": [episode.answer]}


if __name__ == "__main__":
    sys.exit(main())
