"""Check text generation with media on top of Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import factory
from model.config import CrossAttentionConfig, LanguageModelConfig
from model.flamingo import Flamingo
from model.generation import generate
from model.generation_probes import probe_batches
from model.media_inputs import media_inputs
from model.tokens import SpecialTokenIds
from model.tower_patches import Grid
from tests.model.builders import BEYOND, EOS, FAMILIES, INSIDE, random_media, random_text, tiny_flamingo

IMAGE, END = BEYOND.image_id, BEYOND.end_of_chunk_id
PROMPTS = [[1, IMAGE, 5, 6, END, IMAGE, 7], [1, 9], [1, IMAGE], [1, 4, IMAGE, 8, 11, 12, END, 13, IMAGE, IMAGE, 10, 14]]
COUNTS = [2, 0, 1, 3]


def one_by_one(model: Flamingo, media: Tensor, **settings: Any) -> list[list[int]]:
    texts, start = [], 0
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        own = media[start : start + count] if count else None
        texts += generate(model, [prompt], own, [count], **settings)
        start += count
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_the_same_as_its_prompts_one_by_one(family: str) -> None:
    model = tiny_flamingo(family, gates=1.0, seed=1)
    media = random_media(6)
    settings = {"max_new_tokens": 8, "stop_ids": [EOS]}
    batch = generate(model, PROMPTS, media, COUNTS, **settings)
    assert batch == one_by_one(model, media, **settings)
    assert len({tuple(text) for text in batch}) > 1


def test_media_of_any_shape_give_the_same_texts_in_a_batch_and_alone() -> None:
    model = tiny_flamingo(gates=1.0, seed=1)
    grids: list[Grid] = [(1, 2, 2), (1, 3, 1), (2, 1, 4), (1, 1, 1), (1, 4, 3), (1, 2, 5)]
    shapes = [(frames, 3, rows * 8, columns * 8) for frames, rows, columns in grids]
    generator = torch.Generator().manual_seed(0)
    media = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": [EOS]}
    patches, found = media_inputs(media, 8)
    assert found == tuple(grids)
    batch = generate(model, PROMPTS, patches, COUNTS, media_grids=found, **settings)
    start, alone = 0, []
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        own, own_grids = media_inputs(media[start : start + count], 8) if count else (None, None)
        alone += generate(model, [prompt], own, [count], media_grids=own_grids, **settings)
        start += count
    assert batch == alone
    turned = generate(model, PROMPTS, 255 - patches, COUNTS, media_grids=found, **settings)
    assert turned != batch
    with pytest.raises(ValueError, match="media has 6 rows, but media_per_prompt adds up to 1"):
        generate(model, [[1, IMAGE]], patches, [1], media_grids=found, max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_search_is_the_argmax_of_the_whole_model(family: str) -> None:
    """Compare with a search without cache and padding, which rebuilds the media index for every token."""
    model = tiny_flamingo(family, gates=1.0, seed=2)
    prompt, media = PROMPTS[0], random_media(2)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            logits = model(torch.tensor([ids]), media=media).logits[0, -1]
            logits[IMAGE] = -torch.inf
            ids.append(int(logits.argmax()))
    expected = ids[len(prompt) :]
    if EOS in expected:
        expected = expected[: expected.index(EOS)]
    assert generate(model, [prompt], media, [2], max_new_tokens=8, stop_ids=[EOS]) == [expected]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "gpt2"])
def test_beam_search_of_a_batch_equals_its_prompts_one_by_one(family: str) -> None:
    model = tiny_flamingo(family, gates=1.0, seed=3)
    media = random_media(6)
    settings = {"max_new_tokens": 6, "num_beams": 3}
    batch = generate(model, PROMPTS, media, COUNTS, **settings)
    assert batch == one_by_one(model, media, **settings)
    assert batch != generate(model, PROMPTS, media, COUNTS, max_new_tokens=6)


def test_beams_find_more_likely_texts() -> None:
    model = tiny_flamingo(gates=1.0, seed=4)
    media = random_media(1)
    prompts = [[1, IMAGE, *text] for text in random_text(6, 3).tolist()]

    def log_probability(num_beams: int) -> float:
        total = 0.0
        for prompt in prompts:
            (text,) = generate(
                model, [prompt], media, [1], max_new_tokens=4, num_beams=num_beams, stop_ids=[0], suppress_tokens=[0]
            )
            ids = torch.tensor([prompt + text])
            labels = torch.full_like(ids, -100)
            labels[0, len(prompt) :] = torch.tensor(text)
            with torch.no_grad():
                total -= model(ids, labels=labels, media=media).loss.item()
        return total

    assert log_probability(8) > log_probability(1) + 0.5


def test_sampling_follows_torchs_generator() -> None:
    model = tiny_flamingo(gates=1.0)
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}

    def sample(seed: int, **more: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(model, PROMPTS, random_media(6), COUNTS, **settings | more)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    greedy = generate(model, PROMPTS, random_media(6), COUNTS, max_new_tokens=12)
    assert sample(0, top_k=1) == sample(1, top_k=1) == greedy


def test_media_matter_for_every_new_token() -> None:
    """Check that the second new token still sees the image; another project's cache lost it there."""
    model = tiny_flamingo(gates=1.0)
    seen: list[Tensor] = []
    block = model.cross_attention[0].attention
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    generate(model, [[1, IMAGE, 5]], random_media(1), [1], max_new_tokens=4, stop_ids=[0], min_new_tokens=4)
    assert [output.shape[1] for output in seen] == [3, 1, 1, 1]
    assert all(output.any(-1)[:, -1].all() for output in seen)


def test_keys_and_values_are_computed_once() -> None:
    model = tiny_flamingo(gates=1.0)
    calls = []
    model.cross_attention[0].attention.key_value.register_forward_hook(lambda *args: calls.append("key_value"))
    model.vision_encoder.register_forward_hook(lambda *args: calls.append("vision"))
    generate(model, PROMPTS, random_media(6), COUNTS, max_new_tokens=5, num_beams=2)
    assert calls == ["vision", "key_value"]


def test_the_language_model_alone_writes_as_if_nothing_was_trained() -> None:
    opened, shut = tiny_flamingo(gates=1.0, seed=1), tiny_flamingo(gates=1.0, seed=1)
    for block in shut.cross_attention:
        for gate in (block.attention_gate, block.feed_forward_gate):
            torch.nn.init.zeros_(gate)
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": [EOS], "blind": True}
    with opened.language_model.alone():
        alone = generate(opened, PROMPTS, None, [0] * len(PROMPTS), **settings)
    assert alone == generate(shut, PROMPTS, None, [0] * len(PROMPTS), **settings)
    assert alone != generate(opened, PROMPTS, None, [0] * len(PROMPTS), **settings)


@pytest.mark.parametrize("attend", ["one", "all"])
def test_only_attend_all_reads_earlier_media_of_the_prompt(attend: str) -> None:
    """Check that with "one" the tokens after the second image do not read the keys of the first."""
    cross_attention = CrossAttentionConfig(every_n_layers=9, head_dim=8, num_heads=4, attend=attend)
    model = tiny_flamingo(gates=1.0, cross_attention=cross_attention)
    outputs: list[Tensor] = []
    model.cross_attention[0].attention.register_forward_hook(lambda module, args, output: outputs.append(output[:, -1]))
    for seed in (0, 1):
        media = random_media(2)
        media[0] = random_media(1, seed=seed)[0]
        generate(model, [[1, IMAGE, 5, IMAGE, 6]], media, [2], max_new_tokens=1)
    assert torch.equal(outputs[0], outputs[1]) == (attend == "one")


@pytest.mark.parametrize("tokens", [BEYOND, INSIDE], ids=["beyond", "inside"])
def test_generation_stops_at_the_end_of_chunk_and_never_writes_an_image(tokens: SpecialTokenIds) -> None:
    model = tiny_flamingo("gemma3", tokens, gates=1.0)
    image_row, end_row = model.language_model.output_rows
    with torch.no_grad():  # otherwise both would be rare
        image_row.weight.mul_(4)
        end_row.weight.mul_(4)
    torch.manual_seed(0)
    prompts = random_text(12, 4).tolist()
    texts = generate(model, prompts, None, [0] * 12, max_new_tokens=20, do_sample=True, stop_ids=[0])
    written = [token for text in texts for token in text]
    assert tokens.end_of_chunk_id in written
    assert tokens.image_id not in written
    texts = generate(model, prompts, None, [0] * 12, max_new_tokens=20, do_sample=True)
    assert not any(tokens.end_of_chunk_id in text or EOS in text for text in texts)
    assert min(len(text) for text in texts) < 20


def test_without_media_the_model_is_a_text_model() -> None:
    model = tiny_flamingo(gates=1.0)
    with_blind_media = generate(model, [[1, 5, 6]], random_media(1)[:0], [0], max_new_tokens=5)
    assert generate(model, [[1, 5, 6]], None, [0], max_new_tokens=5) == with_blind_media


def test_image_tokens_without_media_are_an_error_unless_the_model_is_blind() -> None:
    model = tiny_flamingo(gates=1.0)
    for count in (0, 1):
        with pytest.raises(ValueError, match="prompt 0 has 1 image tokens|media has 0 rows"):
            generate(model, [[1, IMAGE, 6]], None, [count], max_new_tokens=5)
    prompts, media = [[1, IMAGE, 6], [1, IMAGE, 6, 7]], random_media(2)
    blind = generate(model, prompts, media, [1, 1], max_new_tokens=5, blind=True)
    assert blind == generate(model, prompts, 255 - media, [1, 1], max_new_tokens=5, blind=True)
    assert blind == generate(model, prompts, None, [0, 0], max_new_tokens=5, blind=True)


def test_the_language_models_own_generation_defaults_do_not_matter() -> None:
    expected = generate(tiny_flamingo(), [[1, 5, 6]], None, [0], max_new_tokens=9)
    build = factory.build_language_model

    def sampled(*args: Any, **options: Any) -> Any:
        lm = build(*args, **options)
        lm.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_length=50)
        return lm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "build_language_model", sampled)
        model = tiny_flamingo()
    assert generate(model, [[1, 5, 6]], None, [0], max_new_tokens=9) == expected


def test_media_that_do_not_fit_the_prompts_are_an_error() -> None:
    model = tiny_flamingo()
    media = random_media(2)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], None, [0, 0], max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 0 has 1 image tokens, but media_per_prompt says 2"):
        generate(model, [[1, IMAGE]], media, [2], max_new_tokens=2)
    with pytest.raises(ValueError, match="media has 2 rows, but media_per_prompt adds up to 1"):
        generate(model, [[1, IMAGE]], media, [1], max_new_tokens=2)
    with pytest.raises(ValueError, match="2 prompts but media_per_prompt has 1"):
        generate(model, [[1, IMAGE], [1]], media, [1], max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"num_beams": 0}, "num_beams 0"),
        ({"num_beams": -1}, "num_beams -1"),
        ({"num_beams": 1.5}, "num_beams 1.5"),
        ({"do_sample": True, "top_p": 0.0}, "top_p 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p 1.5"),
        ({"do_sample": True, "top_p": float("nan")}, "top_p nan"),
        ({"do_sample": True, "temperature": 0}, "temperature 0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature -1.0"),
        ({"do_sample": True, "top_k": -3}, "top_k -3"),
        ({"length_penalty": float("inf")}, "length_penalty inf"),
        ({"beams": 3}, "beams: no such setting.*num_beams"),
        ({"repetition_penalti": 3}, "did you mean repetition_penalty"),
        ({"eos_token_id": 3}, "eos_token_id"),
        ({"use_cache": False}, "use_cache"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"num_return_sequences": 2}, "num_return_sequences 2"),
        ({"num_return_sequences": 0}, "num_return_sequences 0"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_flamingo(), [[1, 5]], None, [0], **{"max_new_tokens": 2, **settings})


def test_prompts_that_cannot_be_continued_are_named() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        generate(tiny_flamingo(), [], None, [], max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 1 has the token id 99"):
        generate(tiny_flamingo(), [[1], [1, 99]], None, [0, 0], max_new_tokens=2)
    with pytest.raises(ValueError, match="64 positions.*max_new_tokens is 90.*at most 62"):
        generate(tiny_flamingo("gpt2"), [[1, 5]], None, [0], max_new_tokens=90, stop_ids=[0], suppress_tokens=[0])


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 3.0}])
def test_tokens_are_told_one_by_one(sampling: dict[str, Any]) -> None:
    model, media = tiny_flamingo(gates=1.0), random_media(2)
    settings = {"max_new_tokens": 12, **sampling}
    lengths = set()
    for seed in range(8):
        told: list[int] = []
        torch.manual_seed(seed)
        expected = generate(model, PROMPTS[:1], media, [2], **settings)
        torch.manual_seed(seed)
        assert generate(model, PROMPTS[:1], media, [2], on_token=told.append, **settings) == expected == [told]
        lengths.add(len(told))
    if sampling:
        assert len(lengths) > 1  # some texts end with a stop token


def test_an_error_while_a_token_is_told_ends_the_text() -> None:
    told: list[int] = []

    def stop_after_three(token: int) -> None:
        told.append(token)
        if len(told) == 3:
            raise InterruptedError

    model, media = tiny_flamingo(gates=1.0), random_media(2)
    whole = generate(model, PROMPTS[:1], media, [2], max_new_tokens=12, stop_ids=[0])
    with pytest.raises(InterruptedError):
        generate(model, PROMPTS[:1], media, [2], max_new_tokens=12, stop_ids=[0], on_token=stop_after_three)
    assert told == whole[0][:3]
    assert generate(model, PROMPTS[:1], media, [2], max_new_tokens=12, stop_ids=[0]) == whole


@pytest.mark.parametrize(
    ("number", "settings", "message"),
    [
        (2, {}, "on_token tells the tokens of one text, but prompts is 2"),
        (1, {"num_beams": 2}, "num_beams is 2"),
        (1, {"do_sample": True, "num_return_sequences": 2}, "num_return_sequences is 2"),
    ],
)
def test_tokens_of_several_texts_cannot_be_told(number: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_flamingo(), [[1, 5]] * number, None, [0] * number, max_new_tokens=2, on_token=print, **settings)


def test_several_texts_of_a_prompt_follow_each_other() -> None:
    model, media = tiny_flamingo(gates=1.0, seed=3), random_media(6)
    settings: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3}
    texts = generate(model, PROMPTS, media, COUNTS, num_return_sequences=3, **settings)
    assert texts[::3] == generate(model, PROMPTS, media, COUNTS, **settings)
    assert len(texts) == 3 * len(PROMPTS)


# Families that see padding, or the length of other rows, in transformers itself.
_SENSITIVE: dict[str, dict[str, Any]] = {
    "longrope": FAMILIES["llama"]
    | {
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 12,
        },
    },
    "dynamic": FAMILIES["llama"]
    | {
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "minimax": FAMILIES["llama"]
    | {
        "model_type": "minimax",
        "head_dim": 8,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "rwkv": {
        "model_type": "rwkv",
        "vocab_size": 48,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "context_length": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@pytest.mark.parametrize("family", _SENSITIVE)
def test_prompts_of_one_length_are_grouped_where_padding_or_other_rows_would_matter(family: str) -> None:
    model = tiny_flamingo(language_model=LanguageModelConfig(architecture=_SENSITIVE[family]), gates=1.0, seed=1)
    assert not probe_batches(model.language_model.lm).batches_any_lengths
    with torch.no_grad():
        for parameter in model.language_model.lm.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    media = random_media(6)
    batch = generate(model, PROMPTS, media, COUNTS, max_new_tokens=8, stop_ids=[EOS])
    assert batch == one_by_one(model, media, max_new_tokens=8, stop_ids=[EOS])
    assert batch[::-1] == generate(
        model, PROMPTS[::-1], media[[3, 4, 5, 2, 0, 1]], COUNTS[::-1], max_new_tokens=8, stop_ids=[EOS]
    )
    beams: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "stop_ids": [EOS]}
    if family == "rwkv":
        with pytest.raises(ValueError, match="num_beams 2: RwkvForCausalLM"):
            generate(model, PROMPTS, media, COUNTS, **beams)
    else:
        assert generate(model, PROMPTS, media, COUNTS, **beams) == one_by_one(model, media, **beams)
    with pytest.raises(ValueError, match="synced_ranks"):
        generate(model, PROMPTS, media, COUNTS, max_new_tokens=2, synced_ranks=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_continue_all_prompts_together(family: str) -> None:
    assert probe_batches(tiny_flamingo(family).language_model.lm).batches_any_lengths
