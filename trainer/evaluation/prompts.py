"""Write the prompts of queries: the paper's texts, OpenFlamingo's, or one's own.

A prompt is ``<BOS>`` and, for each demonstration, ``before <image> context answer <EOC> separator``; then the query up
to its context. Each text is encoded by itself, as the row builders of training do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Formatter

from model.processor import Special
from trainer.config.evaluation_tasks import PromptTexts
from trainer.evaluation.query import Kind, Medium, Query

_CAPTION_CUT = ("Output:",)
_STYLES: dict[str, dict[Kind, PromptTexts]] = {
    # Paper, appendix B.1.5.
    "paper": {
        "caption": PromptTexts("Output:", " {answer}", cut=_CAPTION_CUT),
        "class": PromptTexts("Output:", " {answer}"),
        "question": PromptTexts("Question: {question} Answer:", " {answer}", cut=("Question:", "Answer:")),
        "meme": PromptTexts('is an image with written: "{text}" on it. Is it hateful? Answer:', " {answer}"),
    },
    # open_flamingo/eval/eval_model.py and eval_datasets.py.
    "openflamingo": {
        "caption": PromptTexts("Output:", "{answer}", "\n", _CAPTION_CUT),
        "class": PromptTexts("Output:", "{answer}"),
        "question": PromptTexts(
            "Question:{question} Short answer:", "{answer}", "\n", ("Question:", "Answer:", "Short answer:")
        ),
        "meme": PromptTexts("is an image with: '{text}' written on it. Is it hateful? Answer:", "{answer}"),
    },
    "plain": {
        "caption": PromptTexts(),
        "class": PromptTexts(),
        "question": PromptTexts("{question}", " {answer}"),
        "meme": PromptTexts("{text}", " {answer}"),
    },
}
_EPISODE = PromptTexts("{context}")
_FIELDS: dict[Kind, frozenset[str]] = {"question": frozenset({"question"}), "meme": frozenset({"text"})}


def prompt_texts(kind: Kind, style: str, own: PromptTexts | None) -> PromptTexts:
    """Return the texts of a kind of prompt.

    Args:
        kind: Kind of prompt.
        style: ``prompt_style``.
        own: The task's own texts; None takes those of the style.

    Raises:
        ValueError: Own texts name a field that the queries do not have, or the answer lacks ``{answer}``.
    """
    if kind == "episode":
        return _EPISODE
    if own is None:
        return _STYLES[style][kind]
    for name, text, known in (
        ("context", own.context, _FIELDS.get(kind, frozenset())),
        ("answer", own.answer, frozenset({"answer"})),
    ):
        try:
            found = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
        except ValueError as error:
            raise ValueError(f"prompt.{name} {text!r}: {error}; write {{{{ for a brace") from error
        if not found <= known:
            fields = ", ".join(f"{{{one}}}" for one in sorted(known)) or "no field"
            raise ValueError(f"prompt.{name} {text!r} names a field that the queries lack; they have {fields}")
    if "{answer}" not in own.answer:
        raise ValueError(f"prompt.answer {own.answer!r} has no {{answer}}")
    return own


@dataclass
class Prompt:
    """Hold a prompt before it is encoded.

    Attributes:
        parts: Texts and special tokens after ``<BOS>``.
        media: A medium for each ``<image>``.
        demonstrations: Ids of the demonstrations.
    """

    parts: list[str | Special] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    demonstrations: list[str] = field(default_factory=list)

    def add(self, texts: PromptTexts, query: Query, *, answered: bool, shows_medium: bool = True) -> None:
        """Add a demonstration (``answered``) or the query itself."""
        medium = query.medium if shows_medium else None
        self._text(query.before)
        if medium is not None:
            self.parts.append(Special.IMAGE)
            self.media.append(medium)
        fields = {"context": "", **query.fields}
        self._text(texts.context.format(**fields))
        if not answered:
            return
        self._text(texts.answer.format(answer=query.shown_answer))
        if medium is not None or not shows_medium:
            self.parts.append(Special.END_OF_CHUNK)
        self._text(texts.separator)

    def _text(self, text: str) -> None:
        if text:
            self.parts.append(text)

    def join_texts(self) -> None:
        """Join adjacent texts, which are then encoded together."""
        joined: list[str | Special] = []
        for part in self.parts:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        self.parts = joined


def build_prompt(
    texts: PromptTexts, kind: Kind, query: Query, demonstrations: Sequence[Query], examples: Sequence[Query] = ()
) -> Prompt:
    """Return the prompt of a query.

    Args:
        texts: Texts of the prompt.
        kind: Kind of prompt; texts of episodes are joined.
        query: Query, with the medium that it shows.
        demonstrations: Demonstrations in the order of the prompt, with the media that they show.
        examples: Text-only examples before the query (paper, section 4: zero-shot).
    """
    prompt = Prompt()
    for example in examples:
        prompt.add(texts, example, answered=True, shows_medium=False)
    for demonstration in demonstrations:
        prompt.add(texts, demonstration, answered=True)
    prompt.demonstrations = [one.id for one in (*examples, *demonstrations)]
    prompt.add(texts, query, answered=False)
    if kind == "episode":
        prompt.join_texts()
    return prompt


def cut_answer(answer: str, cuts: Sequence[str]) -> str:
    """Return a generated answer up to the first text at which it is cut, without white space around it."""
    for cut in cuts:
        answer = answer.partition(cut)[0] if cut else answer
    return answer.strip()
