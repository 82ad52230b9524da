"""Check prompts, media and settings of a generation before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig

from model.flamingo import Flamingo
from model.generation_probes import probe_batches

# Decided by model.generation.
_OWN = ("use_cache", "eos_token_id", "pad_token_id", "bos_token_id", "max_length")
# They change what Hugging Face's generate returns, or feed tokens in other portions.
_UNSUPPORTED = (
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "is_assistant",
    "num_assistant_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
    "stop_strings",
    "token_healing",
    "use_mtp",
)


def check_settings(
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    sampling: Mapping[str, float],
    others: Mapping[str, Any],
) -> None:
    """Check the settings of a generation.

    Args:
        max_new_tokens: Most new tokens of a prompt.
        num_beams: Beams of beam search.
        length_penalty: Setting of beam search.
        sampling: temperature, top_p and top_k; empty without sampling.
        others: Other settings of ``transformers.GenerationConfig``.

    Raises:
        ValueError: A setting is unknown or impossible.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if not _is_int(value) or value < 1:
            raise ValueError(f"{name} {value!r}: set a whole number of at least 1")
    _check_number("length_penalty", length_penalty, -float("inf"), float("inf"))
    if sampling:
        _check_number("temperature", sampling["temperature"], 0, float("inf"))
        _check_number("top_p", sampling["top_p"], 0, 1)
        if not _is_int(sampling["top_k"]) or sampling["top_k"] < 0:
            raise ValueError(f"top_k {sampling['top_k']!r}: set a whole number of at least 0; 0 is no limit")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    usable = known - {*_OWN, *_UNSUPPORTED, "transformers_version"}
    for name in others:
        if name in known and name not in usable:
            raise ValueError(f"{name}: generate does not take this setting of transformers.GenerationConfig")
        if name not in usable:
            meant = get_close_matches(name, [*usable, "top_p", "top_k", "temperature"], 1)
            hint = f"; did you mean {meant[0]}?" if meant else ""
            raise ValueError(f"{name}: no such setting in transformers.GenerationConfig{hint}")
    texts = others.get("num_return_sequences", 1)
    if not _is_int(texts) or texts < 1:
        raise ValueError(f"num_return_sequences {texts!r}: set a whole number of at least 1")
    if texts > 1 and not sampling and texts > num_beams:
        raise ValueError(
            f"num_return_sequences {texts}: without do_sample there are as many texts as num_beams ({num_beams})"
        )


def check_prompts(
    model: Flamingo, prompts: Sequence[Sequence[int]], num_media: int, media_per_prompt: Sequence[int], *, blind: bool
) -> None:
    """Check that prompts and media fit each other.

    Args:
        model: Model, for the ids of its tokens.
        prompts: Token ids of each prompt.
        num_media: Number of all media.
        media_per_prompt: Number of media of each prompt.
        blind: Whether ``<image>`` tokens show nothing.

    Raises:
        ValueError: There is no prompt, a prompt is empty or has an unknown token, or the numbers of media differ.
    """
    image_id, vocab_size = model.tokens.image_id, model.language_model.vocab_size
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    if len(prompts) != len(media_per_prompt):
        raise ValueError(f"{len(prompts)} prompts but media_per_prompt has {len(media_per_prompt)} entries")
    for number, (prompt, count) in enumerate(zip(prompts, media_per_prompt, strict=True)):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: begin it with the token bos_id")
        added = model.language_model.token_ids
        if unknown := [token for token in prompt if not 0 <= token < vocab_size and token not in added]:
            raise ValueError(
                f"prompt {number} has the token id {unknown[0]}, but the language model knows 0 to {vocab_size - 1}: "
                "encode prompts with the tokenizer of the export"
            )
        found = sum(token == image_id for token in prompt)
        if not blind and found != count:
            raise ValueError(
                f"prompt {number} has {found} image tokens, but media_per_prompt says {count}: each image token stands "
                "for one medium"
            )
    if num_media != sum(media_per_prompt):
        raise ValueError(f"media has {num_media} rows, but media_per_prompt adds up to {sum(media_per_prompt)}")


def check_rows(model: Flamingo, num_beams: int, texts: int) -> None:
    """Check that the language model can continue several rows of one prompt.

    Raises:
        ValueError: It mixes the rows of a batch.
    """
    lm = model.language_model.lm
    if max(num_beams, texts) > 1 and not probe_batches(lm).keeps_rows_apart:
        name = "num_beams" if num_beams > 1 else "num_return_sequences"
        raise ValueError(
            f"{name} {max(num_beams, texts)}: {type(lm).__name__} in this version of transformers mixes the rows of a "
            f"batch; set {name} to 1"
        )


def check_streaming(num_prompts: int, num_beams: int, texts: int) -> None:
    """Check that new tokens can be told one by one.

    Raises:
        ValueError: There are several texts, or beams, whose first tokens may still change.
    """
    for name, value in (("prompts", num_prompts), ("num_beams", num_beams), ("num_return_sequences", texts)):
        if value > 1:
            raise ValueError(f"on_token tells the tokens of one text, but {name} is {value}: set it to 1")


@contextmanager
def explain_missing_positions(lm: Any, prompt_length: int, max_new_tokens: int) -> Iterator[None]:
    """Explain the error of a table of positions that ends before the text does.

    Raises:
        ValueError: The language model has fewer positions than prompt and new tokens need.
    """
    try:
        yield
    except IndexError as error:
        positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        if positions is None or prompt_length + max_new_tokens <= positions:
            raise
        raise ValueError(
            f"{type(lm).__name__} has {positions} positions, but the prompt has {prompt_length} tokens and "
            f"max_new_tokens is {max_new_tokens}: shorten the prompt, or set max_new_tokens to at most "
            f"{max(0, positions - prompt_length)}"
        ) from error


def _check_number(name: str, value: object, above: float, most: float) -> None:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not above < value <= most
        or abs(value) == float("inf")
    ):
        bounds = f"above {above:g}" if most == float("inf") else f"above {above:g}, at most {most:g}"
        raise ValueError(f"{name} {value!r}: set a number {bounds if above > -float('inf') else 'that is finite'}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
