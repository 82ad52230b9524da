"""Let lmms_eval score an export: ``python -m lmms_eval --model flamingo --model_args pretrained=EXPORT ...``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from torch import Tensor

from model.imports.hub_code.modeling_flamingo import FlamingoForConditionalGeneration
from model.imports.hub_code.processing_flamingo import VIDEO, FlamingoProcessor

_GENERATION = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "length_penalty")
_VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".ts", ".gif")


class FlamingoForLmmsEval(lmms):
    """Answer lmms_eval's requests with an export.

    Attributes:
        model: Model in transformers' interface.
        processor: Its processor.
        batch_size: Prompts that are continued together.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        max_new_tokens: int = 64,
        **others: Any,
    ) -> None:
        """Load an export; the arguments are lmms_eval's ``--model_args``.

        Args:
            pretrained: Export folder, or repository on the hub.
            device: Device of torch; None takes a GPU if there is one.
            batch_size: Prompts that are continued together.
            dtype: Type of the parameters; "auto" takes that of the training.
            max_new_tokens: Most new tokens where the task does not say it.
            **others: Arguments that lmms_eval passes to every model.

        Raises:
            ValueError: An argument is unknown, or the export cannot be loaded.
        """
        super().__init__()
        if unknown := sorted(set(others) - {"max_batch_size"}):
            raise ValueError(
                f"--model_args {', '.join(unknown)}: flamingo takes pretrained, device, batch_size, dtype and "
                "max_new_tokens"
            )
        self.model = FlamingoForConditionalGeneration.from_pretrained(
            pretrained, dtype=dtype, device_map=device or "auto"
        )
        self.processor = FlamingoProcessor.from_pretrained(pretrained)
        self.batch_size = int(batch_size)
        self._most = int(max_new_tokens)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the text that follows each prompt, cut at the task's stop strings."""
        texts: list[str] = []
        for batch in _batches(requests, self.batch_size):
            texts += self._continue(batch)
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """Return the loss of each continuation, and whether greedy search would give it.

        lmms_eval takes the choice with the lowest number (``ConfigurableTask.process_results``), so this is the
        negative log-likelihood. Version 0.7.3 turns pairs into text, except inside a ``GenerationResult``.
        """
        return [GenerationResult(self._score(*request.args)) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("flamingo does not answer tasks of several rounds: leave them out of --tasks")

    def _continue(self, requests: Sequence[Instance]) -> list[str]:
        """Continue prompts with the settings of the first one, which those of a task share."""
        prompts = [self._prompt(context, visuals, *doc) for context, _, visuals, *doc in _arguments(requests)]
        inputs = self._encode(prompts)
        settings = {"max_new_tokens": self._most, **requests[0].args[1]}
        until = settings.pop("until", [])
        chosen = {name: settings[name] for name in _GENERATION if settings.get(name) is not None}
        if not chosen.get("do_sample"):
            chosen = {name: value for name, value in chosen.items() if name not in ("temperature", "top_p")}
        tokens = self.model.generate(**inputs, **chosen)[:, inputs["input_ids"].shape[1] :]
        decode = self.processor.tokenizer.decode
        stops = [until] if isinstance(until, str) else until
        texts = []
        for request, row in zip(requests, tokens, strict=True):
            text = _cut(str(decode(row, skip_special_tokens=True)), stops)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    @torch.no_grad()
    def _score(self, context: str, continuation: Any, visuals: Any = None, *doc: Any) -> tuple[float, bool]:
        answer = continuation if isinstance(continuation, str) else continuation(self._document(*doc))
        inputs = self._encode([self._prompt(context, visuals, *doc)])
        start = inputs["input_ids"].shape[1]
        # Training encodes an answer by itself too.
        targets = torch.tensor(self.processor.layout.encode_parts([answer])[1:], device=self.model.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], targets[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits: Tensor = self.model(**inputs).logits[0, start - 1 : -1].float()
        log_probabilities = logits.log_softmax(-1).gather(-1, targets[:, None])
        return -float(log_probabilities.sum()), bool((logits.argmax(-1) == targets).all())

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _prompt(self, context: str, visuals: Any, *doc: Any) -> tuple[str, list[Any], list[Any]]:
        """Return a prompt with a place for each medium, its images and its videos.

        Media of a context without places come first, as in training.
        """
        media = visuals(self._document(*doc)) if callable(visuals) else visuals or []
        videos = [medium for medium in media if _is_video(medium)]
        images = [medium for medium in media if not _is_video(medium)]
        image = self.processor.image_token
        if image not in context and VIDEO not in context:
            context = "".join(VIDEO if _is_video(medium) else image for medium in media) + context
        return context, images, videos

    def _encode(self, prompts: Sequence[tuple[str, list[Any], list[Any]]]) -> Any:
        texts, images, videos = zip(*prompts, strict=True)
        return self.processor(images=images, text=list(texts), videos=videos).to(self.model.device)


def _arguments(requests: Sequence[Instance]) -> Iterator[tuple[Any, ...]]:
    for request in requests:
        yield tuple(request.args)


def _batches(requests: Sequence[Instance], size: int) -> Iterator[list[Instance]]:
    """Yield requests of one task with equal settings together, in their order."""
    remaining = iter(requests)
    pending = list(islice(remaining, 1))
    while pending:
        batch, pending = pending, []
        for request in remaining:
            if len(batch) == size or request.args[1] != batch[0].args[1]:
                pending = [request]
                break
            batch.append(request)
        yield batch


def _is_video(medium: Any) -> bool:
    return isinstance(medium, str) and medium.lower().endswith(_VIDEO_SUFFIXES)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()
