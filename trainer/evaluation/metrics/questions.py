"""Compute the VQA accuracy with the official normalization (github.com/GT-Vision-Lab/VQA, vqaEval.py).

The official code normalizes only where the annotators differ, and drops every answer that equals the left-out one *with
its* ``answer_id``; without ids it drops all equal answers. Here answers are always normalized, and one annotator at a
time is left out by position, so that answers without ids get the same value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official call passes re.UNICODE, which is 32, where re.sub expects the number of replacements.
_MOST_PERIODS = int(re.UNICODE)
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
# The official table maps each of these words without one of its apostrophes to the word.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_KNOWN_WORDS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_FULL_ACCURACY = 3  # annotators that have to agree with an answer


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Return the mean of min(agreeing annotators / 3, 1) over the subsets that leave one annotator out.

    A single annotator has no such subset: the answer is then right or wrong.

    Args:
        answer: Answer of the model.
        annotators: Answer of each annotator, equal ones included.

    Raises:
        ValueError: There are no annotators.
    """
    if not annotators:
        raise ValueError("a question has no annotated answer: it cannot be scored; leave it out of the annotations")
    given = normalize_answer(answer)
    matches = [normalize_answer(one) == given for one in annotators]
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    # Whole numbers are summed, so that full agreement gives exactly 1.
    thirds = sum(min(_FULL_ACCURACY, total - match) for match in matches)
    return thirds / (_FULL_ACCURACY * len(matches))


def normalize_answer(text: str) -> str:
    """Return an answer without punctuation and articles, in lower case, with digits and apostrophes."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _without_punctuation(text)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_KNOWN_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Drop marks that stand beside a space, or in a text with a thousands separator; others become a space."""
    drops_all = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if drops_all or beside_space else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)
