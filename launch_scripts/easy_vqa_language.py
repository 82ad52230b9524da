"""Write the texts from which easy-VQA's language model learns: facts, questions and answers, without images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ANSWERS = (*COLORS, *SHAPES, "yes", "no")

# Shares of the kinds of texts.
LISTS = 0.08  # lists of words of one kind
REPEATED_LISTS = 0.15  # lists of any words, said two or three times
SHORT_QUESTIONS = 0.35  # a fact, and short questions about it
QUESTIONS_WITHOUT_FACT = 0.07
IN_WHOLE_WORDING = 0.5  # share of the short questions that are put as whole ones are: "Question: teal? Answer: yes"
YES_NO = 0.7  # share of yes/no questions among whole ones, as in easy-VQA
PREFER_PRESENT = 0.5  # share of the yes/no questions after a fact that ask for a thing that is there; easy-VQA: 0.17

T = TypeVar("T")


def prompt_of(question: str) -> str:
    """Return the prompt of a question, as the paper's evaluation writes it."""
    return f"Question: {question} Answer:"


def is_negated(question: str) -> bool:
    """Return whether a yes/no question asks whether something is absent: "is no red shape present?"."""
    return not {"no", "not"}.isdisjoint(re.findall(r"\w+", question))


def things_in(question: str) -> list[str]:
    """Return the colors and shapes that a question names."""
    return [word for word in re.findall(r"\w+", question) if word in COLORS or word in SHAPES]


def question_type(question: str, answer: str) -> str:
    """Return "color", "shape", "present" or "absent".

    The last two are the yes/no questions; they say whether the thing asked for is in the image. In five of six
    questions it is not.
    """
    if answer in COLORS:
        return "color"
    if answer in SHAPES:
        return "shape"
    return "present" if (answer == "yes") != is_negated(question) else "absent"


def facts(questions: Sequence[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Return color and shape of an image, as far as its questions and answers say them."""
    color = shape = None
    for question, answer in questions:
        kind = question_type(question, answer)
        color = answer if kind == "color" else color
        shape = answer if kind == "shape" else shape
        if kind != "absent":  # what else the question names is in the image, too
            for thing in things_in(question):
                color, shape = (thing, shape) if thing in COLORS else (color, thing)
    return color, shape


def answer_to(question: str, color: str, shape: str) -> str | None:
    """Return the answer that follows from color and shape; None if the question presupposes other ones."""
    things = things_in(question)
    if question.startswith("what"):
        if not set(things) <= {color, shape}:
            return None
        return color if "color" in question.split() else shape
    return "yes" if (things[0] in (color, shape)) != is_negated(question) else "no"


def texts(rng: np.random.Generator, count: int, questions: Sequence[str]) -> Iterator[str]:
    """Yield texts of four kinds.

    Whole questions alone teach so small a model the words, but not to look up the fact: too few tokens depend on it.
    In repeated lists and short questions many tokens do, so it learns to look things up within minutes. Half of the
    short questions are put in the words around whole ones. Things that are there are asked for as often as others, so
    that "no" is no good guess.

    Args:
        rng: Random generator.
        count: Number of texts.
        questions: Questions to choose from.
    """
    for _ in range(count):
        draw = rng.random()
        color, shape = _pick(rng, COLORS), _pick(rng, SHAPES)
        if draw < LISTS:
            words = COLORS if rng.random() < 0.6 else (*SHAPES, "yes", "no")
            yield " ".join(_pick(rng, words) for _ in range(rng.integers(3, 7)))
        elif draw < LISTS + REPEATED_LISTS:
            some = [_pick(rng, ANSWERS) for _ in range(rng.integers(3, 7))]
            yield " ".join(some * int(rng.integers(2, 4)))
        elif draw < LISTS + REPEATED_LISTS + SHORT_QUESTIONS:
            short = [_short_question(rng, color, shape) for _ in range(rng.integers(3, 9))]
            yield " ".join([f"a {color} {shape}", *short])
        else:
            with_fact = draw < 1 - QUESTIONS_WITHOUT_FACT
            whole = [_whole_question(rng, color, shape, questions, with_fact) for _ in range(rng.integers(1, 5))]
            yield " ".join([f"a {color} {shape}", *whole] if with_fact else whole)


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _short_question(rng: np.random.Generator, color: str, shape: str) -> str:
    if rng.random() < PREFER_PRESENT:
        thing = _pick(rng, (color, shape))
    else:
        thing = _pick(rng, COLORS if rng.random() < 0.6 else SHAPES)
    there = thing in (color, shape)
    forms = (
        f"color? {color}",
        f"shape? {shape}",
        f"a {color} {shape}",
        f"{thing}? {'yes' if there else 'no'}",
        f"no {thing}? {'no' if there else 'yes'}",
        f"not {thing}? {'no' if there else 'yes'}",
    )
    form = _pick(rng, forms)
    question, mark, answer = form.partition("? ")
    if mark and rng.random() < IN_WHOLE_WORDING:
        return f"{prompt_of(question + '?')} {answer}"
    return form


def _whole_question(rng: np.random.Generator, color: str, shape: str, questions: Sequence[str], with_fact: bool) -> str:
    # Colors and shapes are asked for equally often, whether they are there or not. Of random questions, most that ask
    # for something present ask for a shape, because there are few: "a shape? yes; a color? no" would be a good guess,
    # and a model that has it looks nothing up for long.
    yes_no, present, of_color = (bool(draw) for draw in rng.random(3) < (YES_NO, PREFER_PRESENT, 0.5))
    while True:
        question = _pick(rng, questions)
        answer = answer_to(question, color, shape)
        if answer is None:
            continue
        kind = question_type(question, answer)
        if kind in ("color", "shape"):
            is_wanted = not yes_no
        else:
            is_wanted = yes_no and (kind == "present", things_in(question)[0] in COLORS) == (present, of_color)
        if is_wanted or not with_fact:
            return f"{prompt_of(question)} {answer}"
