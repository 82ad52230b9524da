"""Write the quickstart's sentences: captions of two digits, counting, and other simple sentences."""

from __future__ import annotations

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTING = 0.25  # share of the sentences that count
CAPTIONS = 0.5  # share of captions among the other sentences

NOUNS = (
    "dog cat horse bird river mountain child teacher train boat garden window apple orange egg island engine hill "
    "cloud market song letter road wall lamp table chair king farmer sailor"
).split()
ADJECTIVES = "small old red quiet bright heavy empty early young green narrow ancient warm open ugly".split()
VERBS = "sees finds follows remembers paints carries watches leaves helps draws".split()


def article_and_word(word: str) -> str:
    """Return the word with its article: "a three", "an eight", "a one"."""
    return f"{'an' if word[0] in 'aeiou' and word != 'one' else 'a'} {word}"


def caption(left: int, right: int) -> str:
    """Return the caption of a picture of two digits."""
    return f"a handwritten {WORDS[left]} and {article_and_word(WORDS[right])}"


def sentence(rng: np.random.Generator) -> str:
    """Draw one sentence for the language model.

    From counting ("three four five") the model learns to tell the number words apart. Without it, their rows in the
    output embedding stay so similar that the frozen head of a Flamingo cannot.
    """
    if rng.random() < COUNTING:
        start = rng.integers(10)
        return " ".join(WORDS[(start + step) % 10] for step in range(rng.integers(3, 7)))
    x, y = (int(value) for value in rng.integers(0, 10, 2))
    if rng.random() < CAPTIONS:
        return caption(x, y)
    noun, other = (NOUNS[i] for i in rng.integers(0, len(NOUNS), 2))
    first, second = (ADJECTIVES[i] for i in rng.integers(0, len(ADJECTIVES), 2))
    comparison = "more" if x > y else "less" if x < y else "no more"
    forms = (
        f"the {first} {noun} {VERBS[rng.integers(len(VERBS))]} {article_and_word(second)} {other}",
        f"{WORDS[x]} and {WORDS[y]} make {x + y}",
        f"{WORDS[x]} is {comparison} than {WORDS[y]}",
        f"there is {article_and_word(noun)} and {article_and_word(other)} near the {NOUNS[rng.integers(len(NOUNS))]}",
        f"{WORDS[x]} {first} {noun}s and {WORDS[y]} {other}s",
        f"a picture of {article_and_word(noun)} and {article_and_word(other)}",
        f"{article_and_word(noun)} is {first} but the {other} is {second}",
    )
    weights = (2, 1, 1, 2, 2, 2, 2)  # the two forms with numbers alone share the weight of one
    return forms[int(rng.choice(len(forms), p=np.array(weights) / sum(weights)))]
