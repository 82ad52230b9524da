"""Write the language of the in-context demonstration: numbers, invented words, captions in random styles.

A picture shows one or two handwritten digits. Its *number* is their digits, "3" or "35". In text alone the number
stands where the picture will stand, and the label follows without a space: the line "35dako" of a page becomes
``<image>dako<EOC>`` in an interleaved document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np

from launch_scripts.digit_sentences import ADJECTIVES, NOUNS, VERBS, WORDS

Number = tuple[int, ...]  # one or two digits

SINGLES: tuple[Number, ...] = tuple((digit,) for digit in range(10))
PAIRS: tuple[Number, ...] = tuple((left, right) for left in range(10) for right in range(10))
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprtw" for vowel in "aeiou")
_OTHER_WORDS = (*NOUNS, *ADJECTIVES, *VERBS)
STYLE_WORDS = _OTHER_WORDS[::3] + _OTHER_WORDS[1::3]  # of captions in training
HELD_OUT_STYLE_WORDS = _OTHER_WORDS[2::3]  # of captions in the evaluation, and in text alone
_CAPTIONS_IN_FIGURES = 0.3  # share

T = TypeVar("T")


class Line(NamedTuple):
    """Hold one line of a page.

    Attributes:
        number: Number that the picture shows.
        label: Text about it.
    """

    number: Number
    label: str

    def __str__(self) -> str:
        return written(self.number) + self.label


def written(number: Number) -> str:
    """Return the digits of a number: "3" or "35"."""
    return "".join(map(str, number))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """Draw one of the choices."""
    return choices[int(rng.integers(len(choices)))]


def pick_several(rng: np.random.Generator, choices: Sequence[T], count: int) -> list[T]:
    """Draw different choices, in random order."""
    return [choices[place] for place in rng.permutation(len(choices))[:count]]


class InventedWords(NamedTuple):
    """Hold invented words; no word is in two of the parts.

    Attributes:
        train: Words of one to three syllables.
        validation: Words of two or three syllables.
        test: Words of two or three syllables.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@cache
def invented_words() -> InventedWords:
    """Return the invented words, the same ones in every run.

    Their length varies, so that the place of a label in its page does not tell where to look it up.
    """
    rng = np.random.default_rng(7)
    two = pick_several(rng, [a + b for a in SYLLABLES for b in SYLLABLES if a != b], 3400)
    three = sorted({"".join(pick_several(rng, SYLLABLES, 3)) for _ in range(4000)})
    three = pick_several(rng, three, 3400)
    return InventedWords(
        train=(*SYLLABLES, *two[:2800], *three[:2800]),
        validation=(*two[2800:3100], *three[2800:3100]),
        test=(*two[3100:], *three[3100:]),
    )


def distinct_words(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """Draw words that begin with different syllables."""
    while True:
        found = pick_several(rng, words, count)
        if len({word[:2] for word in found}) == count:
            return found


def binding_page(
    rng: np.random.Generator, numbers: Sequence[Number], words: Sequence[str], num_lines: int, max_classes: int
) -> list[Line]:
    """Return lines of two or more numbers, each with a word of its own on this page.

    The number of classes varies, so that the page's period does not tell where to look up a label.
    """
    num_classes = int(rng.integers(2, max_classes + 1))
    shown = pick_several(rng, numbers, num_classes)
    while len(set(shown)) < num_classes:  # some numbers are there several times, as weights
        shown = pick_several(rng, numbers, num_classes)
    names = distinct_words(rng, words, num_classes)
    return [Line(shown[place], names[place]) for place in rng.integers(0, num_classes, num_lines)]


@dataclass(frozen=True)
class Style:
    """A way to write captions. "small three bird five lamp" has before "small", between "bird", after "lamp".

    Attributes:
        before: Words before the first digit.
        between: Word between two digits.
        after: Words after the last digit.
        figures: Whether digits are written as figures instead of words.
    """

    before: str
    between: str
    after: str
    figures: bool

    def caption(self, number: Number) -> str:
        """Return the caption of a number."""
        names = [str(digit) if self.figures else WORDS[digit] for digit in number]
        return " ".join(filter(None, [self.before, f" {self.between} ".join(names), self.after]))


def random_style(rng: np.random.Generator, words: Sequence[str]) -> Style:
    """Draw one of about a million styles.

    Styles have to be this many: after a few of them, a model does not take up an unknown one. A caption in figures
    begins with a word, because a figure would join the number before it.
    """
    figures = bool(rng.random() < _CAPTIONS_IN_FIGURES)
    before = " ".join(pick_several(rng, words, int(rng.integers(1 if figures else 0, 3))))
    after = " ".join(pick_several(rng, words, int(rng.integers(0, 3))))
    return Style(before, pick(rng, words), after, figures)


def caption_page(
    rng: np.random.Generator, numbers: Sequence[Number], words: Sequence[str], num_lines: int
) -> list[Line]:
    """Return lines with captions in one style."""
    style = random_style(rng, words)
    return [Line(number, style.caption(number)) for number in (pick(rng, numbers) for _ in range(num_lines))]
