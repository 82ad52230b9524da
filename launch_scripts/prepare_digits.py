"""Write the quickstart's data: pictures of two handwritten digits side by side, as webdataset shards.

    python launch_scripts/prepare_digits.py --output DIR [--seed 0]

The digits are real: scikit-learn's package contains 1,797 images of 8x8 pixels. They are split into train, validation
and test digits. The 100 ordered pairs of digits are split too: some pairs belong to validation or test alone. A picture
is a 32x32 RGB PNG of two digits of 16x16 pixels. Its caption reads like "a handwritten three and an eight".

    train/{pairs,documents}                train digits in train pairs, with small distortions
    train/text                             sentences
    {validation,test}/held_out             digits of the split in train pairs
    {validation,test}/held_out_pairs       digits of the split in pairs of the split
    {validation,test}/documents            digits of the split in train pairs, three pictures in each document
    test/text                              other sentences of the same kinds

The sentences are about other things, count, or are captions. Their captions cover all 100 pairs, so the language model
may know every caption. Only the pictures of held-out pairs never occur in training. Documents are in MMC4's layout,
with ``image_info`` in arbitrary order, as in real data.

Every folder gets shards and ``manifest.npz``. The command takes seconds, writes the same bytes for the same seed, and
does nothing if it has finished with the same settings before.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs as a file, from any folder

from launch_scripts.digit_sentences import caption, sentence
from launch_scripts.prepared_data import Members, Parts, parse_arguments, prepare_once, write_shards

SIZE = 32  # side of a picture, in pixels
VERSION = 2

Pair = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """Sizes of the data. A change of any of them writes the data again.

    Attributes:
        seed: Seed of all random choices.
        train_digits: Digit images for training.
        validation_digits: Digit images for validation; the test split gets the rest.
        train_pairs: Ordered pairs of digits for training.
        validation_pairs: Pairs for validation alone; the test split gets the rest.
        pairs: Samples in train/pairs.
        documents: Samples in train/documents.
        sentences: Samples in train/text.
        evaluation: Samples in each folder of validation and test.
        version: Version of this script's output.
    """

    seed: int = 0
    train_digits: int = 1400
    validation_digits: int = 100
    train_pairs: int = 80
    validation_pairs: int = 8
    pairs: int = 24_000
    documents: int = 8_000
    sentences: int = 20_000
    evaluation: int = 300
    version: int = VERSION


@dataclass(frozen=True)
class Split:
    """The digits and pairs of one split.

    Attributes:
        digits: Indices into scikit-learn's images, one array for each digit.
        pairs: Ordered pairs of digits of this split.
    """

    digits: tuple[NDArray[np.int64], ...]
    pairs: tuple[Pair, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(__doc__.split("\n")[0], argv)
    return prepare(arguments.output, Settings(seed=arguments.seed))


def prepare(output: Path, settings: Settings) -> int:
    """Write all folders below ``output`` and return an exit code."""
    return prepare_once(output, settings, partial(_writers, output, settings))


def _writers(output: Path, settings: Settings) -> Parts:
    splits = split(settings)
    seen = splits["train"].pairs
    train = Pictures(splits["train"].digits, distort=True)
    work: list[tuple[str, int, Callable[[np.random.Generator, int], Iterable[Members]]]] = [
        ("train/pairs", settings.pairs, partial(pairs, pictures=train, choices=seen)),
        ("train/documents", settings.documents, partial(documents, pictures=train, choices=seen, images=(2, 3))),
        ("train/text", settings.sentences, sentences),
    ]
    for name in ("validation", "test"):
        pictures, own_pairs = Pictures(splits[name].digits, distort=False), splits[name].pairs
        make_documents = partial(documents, pictures=pictures, choices=seen, images=(3, 3))
        work += [
            (f"{name}/held_out", settings.evaluation, partial(pairs, pictures=pictures, choices=seen)),
            (f"{name}/held_out_pairs", settings.evaluation, partial(pairs, pictures=pictures, choices=own_pairs)),
            (f"{name}/documents", settings.evaluation, make_documents),
        ]
    work.append(("test/text", settings.evaluation, sentences))  # at the end: the place of a folder is in its seed
    for number, (name, count, make) in enumerate(work):
        samples = make(np.random.default_rng([settings.seed, number]), count)
        yield name, partial(write_shards, output / name, samples)


def split(settings: Settings) -> dict[str, Split]:
    """Split digit images and ordered pairs of digits into train, validation and test without overlap.

    Pairs are drawn until every digit is on the left of some train pair and on the right of another. A held-out pair is
    then a new combination, not a digit at a place where it never was in training.
    """
    rng = np.random.default_rng(settings.seed)
    target = load_digits().target
    order = rng.permutation(len(target))
    cuts = np.split(order, np.cumsum([settings.train_digits, settings.validation_digits]))
    all_pairs = [(left, right) for left in range(10) for right in range(10)]
    while True:
        mixed = [all_pairs[i] for i in rng.permutation(100)]
        first, second = settings.train_pairs, settings.train_pairs + settings.validation_pairs
        parts = (mixed[:first], mixed[first:second], mixed[second:])
        if all(len({pair[side] for pair in parts[0]}) == 10 for side in (0, 1)):
            break
    return {
        name: Split(tuple(cut[target[cut] == digit] for digit in range(10)), tuple(part))
        for name, cut, part in zip(("train", "validation", "test"), cuts, parts, strict=True)
    }


class Pictures:
    """Draw pictures of pairs from some of the digit images.

    Attributes:
        images: float32 [1797, 1, 8, 8], all digit images, from 0 to 1.
    """

    def __init__(self, digits: Sequence[NDArray[np.int64]], *, distort: bool) -> None:
        self.images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        self._digits, self._distort = digits, distort

    def draw(self, rng: np.random.Generator, wanted: Sequence[Pair]) -> list[bytes]:
        """Return a PNG for each pair."""
        chosen = [rng.choice(self._digits[pair[side]]) for side in (0, 1) for pair in wanted]
        half = SIZE // 2
        images = self.images[np.array(chosen)]
        if self._distort:
            grid = F.affine_grid(distortions(rng, len(chosen)), [len(chosen), 1, half, half], align_corners=False)
            large = F.grid_sample(images, grid, align_corners=False)
        else:
            large = F.interpolate(images, (half, half), mode="bilinear", align_corners=False)
        canvas = torch.zeros(len(wanted), SIZE, SIZE)
        canvas[:, half // 2 : half // 2 + half] = torch.cat([large[: len(wanted), 0], large[len(wanted) :, 0]], 2)
        pixels = (canvas * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        return [png(one) for one in pixels]


def distortions(rng: np.random.Generator, count: int) -> Tensor:
    """Draw affine maps [count, 2, 3]: rotate by up to 0.2 rad, scale by 0.12, shear by 0.15, shift by 0.15."""
    u = torch.from_numpy(rng.uniform(-1, 1, (6, count))).float()
    angle, x_scale, y_scale, shear = 0.2 * u[0], 1 + 0.12 * u[1], 1 + 0.12 * u[2], 0.15 * u[3]
    x_row = torch.stack([x_scale * angle.cos(), shear - y_scale * angle.sin(), 0.15 * u[4]], 1)
    y_row = torch.stack([x_scale * angle.sin(), y_scale * angle.cos(), 0.15 * u[5]], 1)
    return torch.stack([x_row, y_row], 1)


def png(gray: NDArray[np.uint8]) -> bytes:
    """Encode a gray picture [height, width] as an RGB PNG."""
    buffer = io.BytesIO()
    Image.fromarray(gray).convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _draw_pairs(rng: np.random.Generator, count: int, choices: Sequence[Pair]) -> list[Pair]:
    return [choices[i] for i in rng.integers(0, len(choices), count)]


def pairs(rng: np.random.Generator, count: int, pictures: Pictures, choices: Sequence[Pair]) -> Iterator[Members]:
    """Yield image-text samples: ``png``, ``txt``."""
    wanted = _draw_pairs(rng, count, choices)
    for pair, image in zip(wanted, pictures.draw(rng, wanted), strict=True):
        yield {"png": image, "txt": caption(*pair).encode()}


def documents(
    rng: np.random.Generator, count: int, pictures: Pictures, choices: Sequence[Pair], images: tuple[int, int]
) -> Iterator[Members]:
    """Yield interleaved samples: ``json`` (MMC4) and ``0.png``, ``1.png``, ...

    Args:
        rng: Random generator.
        count: Number of documents.
        pictures: Draws the pictures.
        choices: Pairs to choose from.
        images: Smallest and largest number of pictures in a document.
    """
    sizes = rng.integers(images[0], images[1] + 1, count)
    wanted = _draw_pairs(rng, int(sizes.sum()), choices)
    drawn = pictures.draw(rng, wanted)
    start = 0
    for size in map(int, sizes):
        info: list[dict[str, Any]] = []
        members: Members = {}
        for place in map(int, rng.permutation(size)):
            name = f"{len(info)}.png"
            info.append({"image_name": name, "matched_text_index": place, "matched_sim": 1.0})
            members[name] = drawn[start + place]
        texts = [caption(*pair) for pair in wanted[start : start + size]]
        members["json"] = json.dumps({"text_list": texts, "image_info": info}).encode()
        start += size
        yield members


def sentences(rng: np.random.Generator, count: int) -> Iterator[Members]:
    """Yield text samples: ``txt``, one sentence."""
    for _ in range(count):
        yield {"txt": sentence(rng).encode()}


if __name__ == "__main__":
    sys.exit(main())
