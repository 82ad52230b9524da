"""``python -m trainer.benchmark generate``: measure few-shot answers against a plain loop over the same model.

Queries have 8 demonstrations, each an image with a caption, as in the few-shot evaluation. An answer is as long as a
caption. Ours answers the queries as a batch: media that queries share are encoded once (``model.media_cache``), keys
and values of text and media are kept.

The baseline has no caches: for each new token it computes the whole prompt again, the media included, one query after
the other. "one query at a time" is Hugging Face's generation with its cache, where each query encodes its own
demonstrations, as OpenFlamingo's evaluation does. All sides have the same weights, prompts and number of new tokens,
and have to give the same answers. The model is that of ``trainer.benchmark openflamingo``, with a tower of larger
patches (ViT-S/32), so that media, which the baseline encodes most often, are cheap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import FlamingoConfig, VisionEncoderConfig
from model.flamingo import Flamingo
from model.generation import generate
from model.media_cache import MediaCache
from trainer.benchmark.openflamingo import TOKENS, build
from trainer.benchmark.openflamingo import measured_model as openflamingo_model
from trainer.benchmark.result_file import Measurement

BENCHMARK, PLAIN_LOOP, ONE_BY_ONE = "generate", "plain loop without caches", "one query at a time"
SHOTS, TARGET = 8, 5.0
_CAPTION, _QUESTION = 8, 4  # tokens of a caption, and of the text after the query's image
_MOST_DIFFERENT = 0.25  # share of answers that rounding may change where two tokens are nearly equally likely

Answers = list[list[int]]


@dataclass(frozen=True)
class Workload:
    """Hold few-shot prompts.

    Attributes:
        name: What the demonstrations have in common.
        prompts: Token ids of each query's prompt.
        media: uint8 [M, 1, 3, Y, X], media of the first prompt, then those of the second, and so on.
        new_tokens: Tokens of each answer.
    """

    name: str
    prompts: list[list[int]]
    media: Tensor
    new_tokens: int

    @property
    def media_per_prompt(self) -> list[int]:
        """Number of media of each prompt."""
        return [SHOTS + 1] * len(self.prompts)

    def of_query(self, number: int) -> tuple[list[int], Tensor]:
        """Return prompt and media of one query."""
        return self.prompts[number], self.media[number * (SHOTS + 1) : (number + 1) * (SHOTS + 1)]


def measured_model() -> FlamingoConfig:
    """Return the configuration to measure."""
    return replace(openflamingo_model(), vision=VisionEncoderConfig(name="ViT-S-32", feature_norm=False))


def make_workload(num_queries: int, support: int | None, new_tokens: int, image_size: int) -> Workload:
    """Return prompts of random images and texts.

    Args:
        num_queries: Number of queries.
        support: Number of demonstrations that all queries draw from; None gives every query demonstrations of its own.
        new_tokens: Tokens of each answer.
        image_size: Side of the images in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    size = support or num_queries * SHOTS
    images = torch.randint(
        0, 256, (size + num_queries, 1, 3, image_size, image_size), dtype=torch.uint8, generator=generator
    )
    captions = torch.randint(3, TOKENS.image_id, (size + num_queries, _CAPTION), generator=generator).tolist()
    prompts, shown = [], []
    for query in range(num_queries):
        if support is None:
            demonstrations = list(range(query * SHOTS, (query + 1) * SHOTS))
        else:
            demonstrations = torch.randperm(size, generator=generator)[:SHOTS].tolist()
        prompt = [TOKENS.bos_id]
        for place in demonstrations:
            prompt += [TOKENS.image_id, *captions[place], TOKENS.end_of_chunk_id]
        prompts.append([*prompt, TOKENS.image_id, *captions[size + query][:_QUESTION]])
        shown += [*demonstrations, size + query]
    kind = f"from a set of {support}" if support else "of its own for each"
    return Workload(f"{num_queries} queries, {SHOTS} demonstrations {kind}", prompts, images[shown], new_tokens)


def ours(model: Flamingo, work: Workload) -> Answers:
    """Answer all queries together; shared media are encoded once."""
    return _generate(model, work.prompts, work.media, work.media_per_prompt, work.new_tokens, MediaCache())


def one_by_one(model: Flamingo, work: Workload) -> Answers:
    """Answer each query alone, with the language model's cache."""
    found: Answers = []
    for number in range(len(work.prompts)):
        prompt, media = work.of_query(number)
        found += _generate(model, [prompt], media, [SHOTS + 1], work.new_tokens, None)
    return found


@torch.no_grad()
def plain_loop(model: Flamingo, work: Workload) -> Answers:
    """Answer each query alone by a whole forward for each token."""
    found = []
    for number in range(len(work.prompts)):
        prompt, media = work.of_query(number)
        ids, media = list(prompt), media.to(model.device)
        for _ in range(work.new_tokens):
            logits = model(torch.tensor([ids], device=model.device), media=media).logits[0, -1].clone()
            logits[model.tokens.image_id] = -torch.inf
            ids.append(int(logits.argmax()))
        found.append(ids[len(prompt) :])
    return found


def _generate(
    model: Flamingo,
    prompts: Sequence[Sequence[int]],
    media: Tensor,
    media_per_prompt: Sequence[int],
    new_tokens: int,
    cache: MediaCache | None,
) -> Answers:
    return generate(
        model,
        prompts,
        media,
        media_per_prompt,
        max_new_tokens=new_tokens,
        stop_ids=[model.tokens.image_id],  # never generated, so that all answers have one length
        media_cache=cache,
    )


def run(device: str, num_queries: int = 4, new_tokens: int = _CAPTION) -> list[Measurement]:
    """Return all measurements.

    Raises:
        RuntimeError: The sides give different answers.
    """
    model = build(measured_model(), TOKENS, "float32").to(device).eval()
    size = model.vision_encoder.image_size
    rows: list[Measurement] = []
    for support in (2 * SHOTS, None):
        rows += _compare(model, make_workload(num_queries, support, new_tokens, size))
    return rows


def _compare(model: Flamingo, work: Workload) -> Iterator[Measurement]:
    _timed(ours, model, make_workload(1, None, 2, model.vision_encoder.image_size))  # the first call allocates
    seconds, answers = _timed(ours, model, work)
    for name, side, target in ((PLAIN_LOOP, plain_loop, TARGET), (ONE_BY_ONE, one_by_one, None)):
        other_seconds, other_answers = _timed(side, model, work)
        different = sum(a != b for a, b in zip(answers, other_answers, strict=True))
        if different > _MOST_DIFFERENT * len(answers):
            raise RuntimeError(f"{different} of {len(answers)} answers differ from those of {name}: another model ran")
        for measure, number in (
            ("queries per second", len(work.prompts)),
            ("tokens per second", len(work.prompts) * work.new_tokens),
        ):
            value, baseline = number / seconds, number / other_seconds
            yield Measurement(BENCHMARK, work.name, measure, "1/s", value, name, baseline, value / baseline, target)


def _timed(side: Callable[[Flamingo, Workload], Answers], model: Flamingo, work: Workload) -> tuple[float, Answers]:
    start = time.perf_counter()
    answers = side(model, work)  # answers are on the host, so a GPU has finished
    return time.perf_counter() - start, answers
