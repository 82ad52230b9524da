"""Answer batches of queries with a model: generate, or rank the candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from model.flamingo import Flamingo
from model.generation import generate
from model.media_cache import MediaCache
from model.processor import TextLayout
from model.ranking import Candidate, rank
from trainer.data.samples.prompt_media import Media
from trainer.evaluation.controls import WITHOUT_IMAGES
from trainer.evaluation.media import MediaDecoder
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.prepared_task import Cell, PreparedTask, answer_ids
from trainer.evaluation.prompts import Prompt, cut_answer
from trainer.evaluation.query import Medium, Query
from trainer.evaluation.ranks import Ranks

_KEPT_CANDIDATES = 10
_DIGITS = 5  # of a log-likelihood in predictions.jsonl


@dataclass(frozen=True)
class Answerer:
    """Answer queries.

    Attributes:
        model: Model in evaluation mode; its parameters may be partitioned.
        layout: Encodes prompts.
        decoder: Decodes the media of the task.
        ranks: Processes of the evaluation.
        media_cache: Latents of the model's media, which many prompts share.
    """

    model: Flamingo
    layout: TextLayout
    decoder: MediaDecoder
    ranks: Ranks
    media_cache: MediaCache = field(default_factory=MediaCache)

    def answer(self, task: PreparedTask, cell: Cell, queries: Sequence[Query]) -> list[Prediction]:
        """Return the prediction of each query.

        Raises:
            ValueError: A medium cannot be decoded, or the model cannot continue the prompts.
        """
        prompts = [task.prompts(cell, query) for query in queries]
        answer = self._rank if task.is_ranked else self._generate
        with self.model.language_model.alone() if cell.control == "language_model_alone" else nullcontext():
            return answer(task, cell, queries, prompts)

    def _generate(
        self, task: PreparedTask, cell: Cell, queries: Sequence[Query], prompts: list[list[Prompt]]
    ) -> list[Prediction]:
        blind = cell.control in WITHOUT_IMAGES
        first = [versions[0] for versions in prompts]
        media, media_grids = self._decode([] if blind else [one for prompt in first for one in prompt.media])
        found = generate(
            self.model,
            [self.layout.encode_parts(prompt.parts) for prompt in first],
            media,
            [0 if blind else len(prompt.media) for prompt in first],
            max_new_tokens=task.max_new_tokens,
            media_grids=media_grids,
            num_beams=task.config.num_beams,
            length_penalty=task.config.length_penalty if task.config.num_beams > 1 else 1.0,  # greedy search has none
            synced_ranks=self.ranks.synced,
            blind=blind,
            media_cache=self.media_cache,
        )
        cuts = (*task.texts.cut, *task.data.cut)
        answers = [cut_answer(self.layout.tokenizer.decode(ids), cuts) for ids in found]
        return [
            Prediction(query.id, answer, tuple(prompt.demonstrations))
            for query, answer, prompt in zip(queries, answers, first, strict=True)
        ]

    def _rank(
        self, task: PreparedTask, cell: Cell, queries: Sequence[Query], prompts: list[list[Prompt]]
    ) -> list[Prediction]:
        blind = cell.control in WITHOUT_IMAGES
        rows = [(query, prompt) for query, versions in zip(queries, prompts, strict=True) for prompt in versions]
        media, media_grids = self._decode([] if blind else [one for _, prompt in rows for one in prompt.media])
        ids = {text: answer_ids(self.layout, task.texts, text) for query in queries for text in query.candidates or ()}
        ranked = rank(
            self.model,
            [self.layout.encode_parts(prompt.parts) for _, prompt in rows],
            media,
            [0 if blind else len(prompt.media) for _, prompt in rows],
            [[ids[text] for text in query.candidates or ()] for query, _ in rows],
            media_grids=media_grids,
            synced_ranks=self.ranks.synced,
            blind=blind,
            media_cache=self.media_cache,
        )
        predictions, row = [], 0
        for query, versions in zip(queries, prompts, strict=True):
            own = ranked[row : row + len(versions)]
            row += len(versions)
            predictions.append(_ranked_prediction(task, query, versions[0], own))
        return predictions

    def _decode(self, media: Sequence[Medium]) -> Media:
        # Where modules are collectives, a rank that left before them would let the others wait.
        with self.ranks.failing_together() if self.ranks.synced else nullcontext():
            decoded = self.decoder.stack(media)  # the context ends before this returns
        return decoded  # noqa: RET504


def _ranked_prediction(
    task: PreparedTask, query: Query, prompt: Prompt, versions: Sequence[Sequence[Candidate]]
) -> Prediction:
    """Average the log-likelihoods over the orders of the demonstrations, and keep the best candidates."""
    texts = query.candidates or ()
    totals, per_token = {}, {}
    for place, text in enumerate(texts):
        total = math.fsum(version[place].total for version in versions) / len(versions)
        totals[text] = round(total, _DIGITS)
        per_token[text] = round(total / max(1, versions[0][place].num_tokens), _DIGITS)
    deciding = totals if task.config.ranking == "total" else per_token
    best = max(texts, key=deciding.__getitem__)
    kept = {
        *sorted(texts, key=totals.__getitem__, reverse=True)[:_KEPT_CANDIDATES],
        *sorted(texts, key=per_token.__getitem__, reverse=True)[:_KEPT_CANDIDATES],
        *(text for text in query.answers if text in totals),
    }
    return Prediction(
        query.id,
        best,
        tuple(prompt.demonstrations),
        {text: totals[text] for text in texts if text in kept},
        {text: per_token[text] for text in texts if text in kept},
    )
