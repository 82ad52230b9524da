"""Let lm_eval score the language model of a Flamingo in this process, with its Python interface.

``lm_eval.simple_evaluate(model=...)`` takes a ``LanguageModelForLmEval``. It counts text as ``forgetting`` does, so
both find the same bits per byte: a document begins with ``<BOS>``, characters such as ``<image>`` are plain text, and
the added tokens do not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from model.flamingo import Flamingo
from model.pretrained import from_pretrained, load_exported_tokenizer
from model.tokens import FlamingoTokenizer
from trainer.data.samples.text_encoding import TextEncoding
from trainer.evaluation.text_scores import TextScorer
from trainer.runtime.distributed import World
from trainer.tasks.row_builders import flamingo_encoding

_MOST_NEW_TOKENS = 256  # of an answer, where a task does not say it; lm_eval's own value


class LanguageModelForLmEval(TemplateLM):
    """Answer lm_eval's requests with the language model of a Flamingo, without images and cross-attention.

    Each call is a collective where there are several processes. To lm_eval, each is the only one: all of them build the
    same requests, and the model shares them out.

    Args:
        model: Flamingo in evaluation mode.
        encoding: Encodes text.
        decode: Token ids -> text.
        max_tokens: Tokens that the model sees together.
        batch_size: Requests of a process in one forward.
        world: Processes that share the work; None where this one works alone.
    """

    def __init__(
        self,
        model: Flamingo,
        encoding: TextEncoding,
        decode: Callable[[list[int]], str],
        *,
        max_tokens: int = 256,
        batch_size: int = 4,
        world: World | None = None,
    ) -> None:
        super().__init__()
        self._encoding, self._decode, self._max_tokens = encoding, decode, max_tokens
        self._device = next(model.parameters()).device if world is None else world.device
        counts_Z = model.language_model.own_tokens(self._device)
        self._scorer = TextScorer(model.language_model, counts_Z, encoding.pad_id, batch_size, world)

    @classmethod
    def of_export(
        cls, folder: Path, *, device: str = "cpu", max_tokens: int = 256, batch_size: int = 4
    ) -> LanguageModelForLmEval:
        """Load the language model of an export.

        Args:
            folder: Export.
            device: Device of torch.
            max_tokens: Tokens that the model sees together.
            batch_size: Requests in one forward.

        Raises:
            ValueError: The folder is no export.
        """
        model = from_pretrained(folder, device=device).eval()
        return cls.of_model(model, load_exported_tokenizer(folder), max_tokens=max_tokens, batch_size=batch_size)

    @classmethod
    def of_model(cls, model: Flamingo, tokenizer: FlamingoTokenizer, **settings: Any) -> LanguageModelForLmEval:
        """Wrap a model with its tokenizer; ``settings`` are those of the class."""
        return cls(model, flamingo_encoding(tokenizer), tokenizer.tokenizer.decode, **settings)

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self._encoding.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token that a text begins with."""
        return self._encoding.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Return the ids of plain text, without special tokens.

        Args:
            string: Text.
            add_special_tokens: Unused; requests get ``<BOS>`` where they are scored.
            **unused: Other settings of lm_eval.

        Raises:
            SampleError: The tokenizer cannot encode the text.
        """
        return self._encoding.plain_ids(string)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text.

        A text longer than ``max_tokens`` is cut as lm_eval asks for: its last piece has as many tokens before it as
        fit, where ``forgetting`` gives it one.
        """
        pieces: list[list[int]] = []
        predicted, owners = [], []
        for number, request in enumerate(requests):
            ids = self._encoding.plain_ids(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._max_tokens - 1, 1)
            for seen, target in map(make_disjoint_window, windows):
                pieces.append([*seen, *target])
                predicted.append(len(target))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(pieces, predicted), strict=True):
            totals[owner] -= score[0]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        pieces, predicted = [], []
        for (_, continuation), context_ids, ids in requests:
            if not 0 < len(ids) < self._max_tokens:
                raise ValueError(
                    f"the answer {continuation[:80]!r} has {len(ids)} tokens, and max_tokens is {self._max_tokens}"
                )
            begin = [] if context_ids[:1] == [self.prefix_token_id] else [self.prefix_token_id]
            pieces.append([*begin, *context_ids, *ids][-self._max_tokens :])
            predicted.append(len(ids))
        answers = [(-nats, is_greedy) for nats, is_greedy in self._scores(pieces, predicted)]
        for (arguments, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", arguments, answer)
        return answers

    def _scores(self, pieces: list[list[int]], predicted: list[int]) -> Sequence[tuple[float, bool]]:
        return self._scorer.scores(pieces, predicted) if pieces else []

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each context; every process computes all of them.

        Raises:
            ValueError: A task samples its answers.
        """
        return [self._continue(*request.args) for request in requests]

    @torch.no_grad()
    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") and settings.get("temperature", 1) > 0:
            raise ValueError("a task asks for random answers (do_sample); only greedy ones are supported")
        until = settings.get("until", [])
        stops = [until] if isinstance(until, str) else list(until)
        most = min(int(settings.get("max_gen_toks", _MOST_NEW_TOKENS)), self._max_tokens - 1)
        ids = [self.prefix_token_id, *self._encoding.plain_ids(context)][-(self._max_tokens - most) :]
        new: list[int] = []
        text = ""
        while len(new) < most:
            logits_Z: Tensor = self._scorer.logits_of(torch.tensor([[*ids, *new]], device=self._device))[0, -1]
            token = int(logits_Z.masked_fill(~self._scorer.counts_Z, -torch.inf).argmax())
            if token == self.eot_token_id:
                break
            new.append(token)
            text = self._decode(new)
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.partition(stop)[0] if stop else text
        self.cache_hook.add_partial("generate_until", (context, settings), text)
        return text


def task_scores(
    model: LanguageModelForLmEval, tasks: Sequence[str], folder: Path | None, limit: int | None
) -> dict[str, float]:
    """Return every metric of some tasks: ``TASK/METRIC``; a collective.

    Args:
        model: Model to score.
        tasks: Names of lm_eval's tasks.
        folder: Folder with YAML files of tasks; None knows lm_eval's own alone.
        limit: Most documents of a task; None takes all.

    Raises:
        ValueError: A task is not known.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        where = "lm_eval" if folder is None else str(folder)
        raise ValueError(f"forgetting.tasks: {where} has no task {', '.join(unknown)}")
    state = random.getstate()  # lm_eval seeds Python's generator
    try:
        report = evaluate(model, manager.load(list(tasks)), limit=limit, bootstrap_iters=0, log_samples=False)
    finally:
        random.setstate(state)
    scores: dict[str, float] = {}
    for name, found in report["results"].items():
        for key, value in found.items():
            metric, _, filter_name = key.partition(",")
            if isinstance(value, float) and filter_name and not metric.endswith("_stderr"):
                scores[f"{name}/{metric}"] = value
    return scores
