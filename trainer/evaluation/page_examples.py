"""Collect the example prompts of the report's page, with images and attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from model.attention_maps import attention_maps
from model.processor import Special
from trainer.data.errors import DataError
from trainer.evaluation.answering import Answerer
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.prepared_task import Cell, PreparedTask, answer_ids
from trainer.evaluation.prompts import Prompt
from trainer.evaluation.query import BlankMedium, Medium
from trainer.evaluation.report import Scores, prediction_lines

_NUMBER = 50
_END_OF_CHUNK = "<|endofchunk|> "


def page_examples(
    tasks: Sequence[PreparedTask],
    predictions: Mapping[Cell, Mapping[str, Prediction]],
    scores: Scores,
    answerers: Mapping[str, Answerer],
) -> list[dict[str, Any]]:
    """Return up to 50 examples for ``page.write_page``, equally many of each task, from its longest real prompts.

    Args:
        tasks: Tasks of the evaluation.
        predictions: Prediction of each query, by the cell.
        scores: Scores of every cell.
        answerers: Answerer of each task. A partitioned model shows no attention.
    """
    each = max(1, _NUMBER // len(tasks))
    found: list[dict[str, Any]] = []
    for task in tasks:
        cell = Cell(task.name, task.shots[-1])
        step = max(1, len(task.queries) // each)
        chosen = {query.id: query for query in list(task.queries)[::step][:each]}
        for line in _lines(task, cell, predictions, scores):
            if line["id"] in chosen:
                prompt = task.prompts(cell, chosen[line["id"]])[0]
                found.append({**line, **_shown(task, answerers[task.name], prompt, line["answer"])})
    return found[:_NUMBER]


def _lines(
    task: PreparedTask, cell: Cell, predictions: Mapping[Cell, Mapping[str, Prediction]], scores: Scores
) -> Iterator[dict[str, Any]]:
    for line in prediction_lines([task], predictions, scores):
        if (line["shots"], line["control"]) == (cell.shots, cell.control):
            yield line


def _shown(task: PreparedTask, answerer: Answerer, prompt: Prompt, answer: str) -> dict[str, Any]:
    """Return the prompt, its images, and the attention of the answer's tokens."""
    parts: list[str | dict[str, int]] = []
    place = 0
    for part in prompt.parts:
        if part is Special.IMAGE:
            parts.append({"image": place})
            place += 1
        else:
            parts.append(_END_OF_CHUNK if isinstance(part, Special) else part)
    shown: dict[str, Any] = {"prompt": parts, "images": [_read(medium) for medium in prompt.media]}
    attention = _attention(task, answerer, prompt, answer)
    return shown if attention is None else {**shown, "attention": attention}


def _read(medium: Medium) -> bytes:
    """Return the encoded medium; b"" for one without a file, and for a file that is gone since it was answered."""
    if isinstance(medium, BlankMedium):
        return b""
    try:
        return medium.read()
    except (OSError, DataError):
        return b""


def _attention(task: PreparedTask, answerer: Answerer, prompt: Prompt, answer: str) -> dict[str, Any] | None:
    """Return tokens and maps; None for text alone, for no answer, and where the model has no maps."""
    if answerer.ranks.synced or not prompt.media or not answer:
        return None
    layout, model = answerer.layout, answerer.model
    try:
        generated = answer_ids(layout, task.texts, answer)
        media, media_grids = answerer.decoder.stack(prompt.media)
        assert media is not None
        maps = attention_maps(model, layout.encode_parts(prompt.parts), generated, media, media_grids)
    except ValueError:  # a tower of tiles, a medium that is gone, an answer that is no text
        return None
    return {
        "tokens": [layout.tokenizer.tokenizer.decode([token]) for token in generated],
        "patches": [one.tolist() for one in maps.patches],
    }
