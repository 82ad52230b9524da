"""Check the invariants of the model and statements of the paper, on tiny random models of many families."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from model import language_model as language_model_module
from model import lm_probes
from model.config import CrossAttentionConfig, SpecialTokensConfig
from model.factory import build_flamingo
from model.flamingo import Flamingo, cross_attention_blocks
from model.parameters import frozen_fingerprint, frozen_parameters, trainable_parameters
from model.tokens import SpecialTokenIds
from tests.model.builders import (
    BEYOND,
    EOS,
    FAMILIES,
    INSIDE,
    STRADDLING,
    VOCAB_SIZE,
    random_media,
    random_text,
    text_with_media,
    tiny_config,
    tiny_flamingo,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
every_place = pytest.mark.parametrize("tokens", [BEYOND, INSIDE, STRADDLING], ids=["beyond", "inside", "straddling"])


def bare_lm(model: Flamingo, family: str) -> nn.Module:
    """Build a Hugging Face model with the same weights that our code has not wrapped."""
    architecture = dict(FAMILIES[family])
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    dtype = next(model.language_model.lm.parameters()).dtype
    bare = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    bare.load_state_dict(model.language_model.lm.state_dict())
    return bare


def masked_labels(ids: Tensor, tokens: SpecialTokenIds) -> Tensor:
    labels = ids.masked_fill(ids == tokens.image_id, -100)
    labels[:, :2] = -100
    return labels


@every_place
@every_family
def test_logits_at_the_start_are_the_bare_language_models(family: str, tokens: SpecialTokenIds) -> None:
    model = tiny_flamingo(family, tokens)
    ids, media = text_with_media(tokens)
    # The added tokens start at the embeddings of the end-of-sequence token.
    known = ids.masked_fill((ids == tokens.image_id) | (ids == tokens.end_of_chunk_id), EOS)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    with torch.no_grad():
        expected = bare_lm(model, family)(input_ids=known, attention_mask=mask).logits
        found = model(ids, attention_mask=mask, media=media).logits
    old = [i for i in range(VOCAB_SIZE) if i not in (tokens.image_id, tokens.end_of_chunk_id)]
    assert torch.equal(found[..., old], expected[..., old])
    bias = getattr(model.language_model.lm.get_output_embeddings(), "bias", None)
    if bias is None:
        for new in (tokens.image_id, tokens.end_of_chunk_id):
            torch.testing.assert_close(found[..., new], expected[..., EOS])


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_logits_at_the_start_in_bfloat16(family: str) -> None:
    model = build_flamingo(tiny_config(family), BEYOND, dtype="bfloat16")
    ids, media = random_text(2, 10), random_media(2)
    index = torch.zeros_like(ids)
    index[1] = 1
    with torch.no_grad():
        expected = bare_lm(model, family)(input_ids=ids).logits
        found = model(ids, media=media, media_index=index).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[..., :VOCAB_SIZE], expected)


@every_place
@every_family
def test_loss_is_the_summed_cross_entropy_of_the_logits(family: str, tokens: SpecialTokenIds) -> None:
    model = tiny_flamingo(family, tokens, gates=0.7)
    ids, media = text_with_media(tokens)
    labels = masked_labels(ids, tokens)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels[1, -3:] = -100
    logits = model(ids, attention_mask=mask, media=media).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    out = model(ids, attention_mask=mask, labels=labels, media=media)
    assert out.logits is None
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(("family", "shape"), [("gemma3", (1, 2, VOCAB_SIZE + 2)), ("llama", ())])
def test_only_positions_with_a_label_get_logits(family: str, shape: tuple[int, ...]) -> None:
    """Check the shape of the output embedding's result: a scalar loss, except for gemma, which caps its logits."""
    model = tiny_flamingo(family)
    ids, media = text_with_media()
    labels = torch.full_like(ids, -100)
    labels[0, 0] = ids[0, 0]  # the first position of a row is never predicted
    labels[0, 5], labels[1, 11] = ids[0, 5], ids[1, 11]
    shapes = []
    model.language_model.lm.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    loss = model(ids, labels=labels, media=media).loss
    assert shapes == [shape]
    logits = model(ids, media=media).logits.log_softmax(-1)
    torch.testing.assert_close(loss, -(logits[0, 4, ids[0, 5]] + logits[1, 10, ids[1, 11]]))


def test_a_batch_without_labels_has_loss_zero_and_gradients() -> None:
    """Check a batch that trains nothing: its rank has to run the same backward as the others."""
    model = tiny_flamingo(gates=0.5)
    ids, media = text_with_media()
    loss = model(ids, labels=torch.full_like(ids, -100), media=media).loss
    loss.backward()
    assert loss.item() == 0
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@every_family
def test_at_step_0_only_gates_and_added_tokens_have_a_gradient(family: str) -> None:
    model = tiny_flamingo(family)
    ids, media = text_with_media()
    model(ids, labels=masked_labels(ids, BEYOND), media=media).loss.backward()
    for name, parameter in trainable_parameters(model).items():
        moving = name.endswith("_gate") or "_rows." in name
        assert bool(parameter.grad.any()) == moving, name
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
    model.zero_grad()
    model(ids, labels=masked_labels(ids, BEYOND), media=media).loss.backward()
    still = [name for name, p in trainable_parameters(model).items() if not p.grad.any()]
    # media have one frame, so only the first of the time embeddings moves, but they are one tensor
    assert still == []


def test_gradient_of_a_closed_gate_is_right() -> None:
    """Compare with a finite difference in float64: the gated output is 0, so no gradient may be derived from it."""
    model = tiny_flamingo("gpt2").double()  # GPT-2 nowhere converts to float32 by itself
    ids, media = text_with_media()
    gate = model.cross_attention[0].attention_gate

    def loss() -> Tensor:
        return model(ids, labels=ids, media=media).loss

    (grad,) = torch.autograd.grad(loss(), gate)
    step = 1e-4
    with torch.no_grad():
        gate.fill_(step)
        above = loss()
        gate.fill_(-step)
        below = loss()
    torch.testing.assert_close(grad.item(), ((above - below) / (2 * step)).item(), rtol=1e-5, atol=1e-7)


@every_family
def test_text_before_a_medium_does_not_depend_on_it(family: str) -> None:
    model = tiny_flamingo(family, gates=0.7)
    ids, media = text_with_media()
    other = media.clone()
    other[1] = random_media(1, seed=9)[0]
    with torch.no_grad():
        before, after = model(ids, media=media).logits, model(ids, media=other).logits
    assert torch.equal(before[0, :6], after[0, :6])
    assert torch.equal(before[1], after[1])
    assert (before[0, 6:] != after[0, 6:]).any(-1).all()


@every_family
def test_text_without_a_medium_gets_exactly_0_from_cross_attention(family: str) -> None:
    model = tiny_flamingo(family, gates=0.7)
    ids = random_text(2, 10)
    with torch.no_grad():
        with_media = model(ids, media=random_media(2), media_index=torch.full_like(ids, -1)).logits
        without = model(ids).logits
        bare = model.language_model.lm(input_ids=ids).logits
    assert torch.equal(with_media, without)
    assert not torch.equal(without, bare)  # the feed-forward branch runs


@pytest.mark.parametrize("attend", ["one", "all"])
def test_a_token_sees_one_medium_or_all_so_far(attend: str) -> None:
    """Look at the hidden states after the first cross-attention, before self-attention mixes tokens."""
    cross_attention = CrossAttentionConfig(every_n_layers=9, head_dim=8, num_heads=4, attend=attend)
    model = tiny_flamingo(gates=0.7, cross_attention=cross_attention)
    ids = random_text(1, 6)
    index = torch.tensor([[-1, 0, 0, 1, 1, 2]])
    seen = []
    model.language_model.decoder_blocks()[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    media = random_media(3)
    with torch.no_grad():
        model(ids, media=media, media_index=index)
        for medium in range(3):
            changed = media.clone()
            changed[medium] = random_media(1, seed=20 + medium)[0]
            model(ids, media=changed, media_index=index)
    for medium in range(3):
        moved = (seen[1 + medium] != seen[0]).any(-1)[0]
        expected = (index[0] >= medium) if attend == "all" else (index[0] == medium)
        assert torch.equal(moved, expected), medium


def test_training_never_changes_frozen_weights() -> None:
    model = tiny_flamingo("opt", gates=0.3)
    fingerprint = frozen_fingerprint(model)
    model.train()
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    ids, media = text_with_media()
    losses = []
    for _ in range(5):
        loss = model(ids, labels=masked_labels(ids, BEYOND), media=media).loss
        optimizer.zero_grad()
        (loss / 10).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert frozen_fingerprint(model) == fingerprint
    assert all(parameter.grad is None for parameter in frozen_parameters(model).values())


@pytest.mark.parametrize("family", [f for f, a in FAMILIES.items() if any("dropout" in k or "pdrop" in k for k in a)])
def test_train_mode_switches_no_dropout_on(family: str) -> None:
    model = tiny_flamingo(family, gates=0.7)
    ids, media = text_with_media()
    with torch.no_grad():
        expected = model.eval()(ids, media=media).logits
        found = model.train()(ids, media=media).logits
    assert model.training
    assert model.cross_attention[0].training
    assert not any(module.training for module in model.language_model.lm.modules())
    assert not any(module.training for module in model.vision_encoder.modules())
    assert torch.equal(found, expected)


def test_added_tokens_are_trained_as_configured() -> None:
    both = trainable_parameters(tiny_flamingo())
    one = trainable_parameters(build_flamingo(tiny_config(tokens=SpecialTokensConfig(train_image=False)), BEYOND))
    rows = [f"language_model.{side}_rows.{n}.weight" for side in ("input", "output") for n in (0, 1)]
    assert [name for name in both if "_rows" in name] == rows
    assert [name for name in one if "_rows" in name] == rows[1::2]
    assert all(both[name].shape == (1, 32) for name in rows)
    assert all(parameter.ndim > 0 for parameter in tiny_flamingo().parameters())  # ZeRO-3 cannot partition others


def test_frozen_parts_below_the_first_cross_attention_build_no_graph() -> None:
    model = tiny_flamingo(cross_attention=CrossAttentionConfig(every_n_layers=2, offset=1, head_dim=8, num_heads=4))
    for row in model.language_model.input_rows:
        row.requires_grad_(False)
    needs = []
    for block in model.language_model.decoder_blocks():
        block.register_forward_hook(lambda module, args, output: needs.append(output.requires_grad))
    ids, media = text_with_media()
    features = model.vision_encoder(media)
    model(ids, labels=ids, media=media)
    assert not features.requires_grad
    assert needs == [False, True, True]


def test_nothing_stays_on_modules_between_calls() -> None:
    model = tiny_flamingo(gates=0.5)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    ids, media = text_with_media()
    model(ids, labels=ids, media=media)
    with pytest.raises((IndexError, ValueError)):
        model(ids, media=media, media_index=torch.full_like(ids, 99))
    assert language_model_module._CALL.get() is None
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert {name: list(values) for name, values in before.items()} == {name: list(v) for name, v in after.items()}
    for name, values in before.items():
        for key, value in values.items():
            assert after[name][key] is value or after[name][key] == value, (name, key)
    # the language model by itself has no cross-attention
    text = random_text(1, 5)
    with torch.no_grad():
        assert torch.equal(
            model.language_model.lm(input_ids=text).logits[..., :VOCAB_SIZE],
            bare_lm(model, "llama")(input_ids=text).logits,
        )


def test_modules_keep_their_classes() -> None:
    model = tiny_flamingo("gpt_neox")
    types = {type(module).__module__ for module in model.language_model.lm.modules()}
    assert all(name.startswith(("transformers.", "torch.")) for name in types)
    assert "llama" not in inspect.getsource(language_model_module).lower()


def test_a_deep_copy_is_an_independent_model() -> None:
    model = tiny_flamingo(gates=0.5)
    ids, media = text_with_media()
    with torch.no_grad():
        expected = model(ids, media=media).logits
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(ids, media=media).logits, expected)


def test_packed_documents_do_not_see_each_other() -> None:
    model = tiny_flamingo(gates=0.7)
    ids, media = text_with_media()
    packed = ids.reshape(1, -1)
    positions = torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        separate = model(ids, media=media).logits
        together = model(packed, media=media, position_ids=positions).logits
    torch.testing.assert_close(together.view_as(separate), separate)


def test_blocks_may_take_hidden_states_by_keyword() -> None:
    doubled = lambda hidden: 2 * hidden  # noqa: E731
    hidden = torch.ones(2)
    run = language_model_module._run_block
    assert torch.equal(run(lambda x, y: x + y, doubled, hidden, y=1), torch.full((2,), 3.0))
    assert torch.equal(run(lambda *, hidden_states: hidden_states, doubled, hidden_states=hidden), 2 * hidden)


def test_two_lists_of_blocks_are_an_error() -> None:
    model = tiny_flamingo().language_model.lm
    model.other = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    with pytest.raises(ValueError, match=r"2 lists of 3 blocks \(model.layers, other\)"):
        lm_probes.find_decoder_blocks(model)


def test_the_config_decides_which_blocks_have_cross_attention() -> None:
    config = tiny_config(cross_attention=CrossAttentionConfig(every_n_layers=4, offset=0))
    assert cross_attention_blocks(config, 10) == [0, 4, 8]  # the paper
    openflamingo = replace(config, cross_attention=CrossAttentionConfig(every_n_layers=4, offset=3))
    assert cross_attention_blocks(openflamingo, 10) == [i for i in range(10) if (i + 1) % 4 == 0]
    with pytest.raises(ValueError, match=r"cross_attention\.offset"):
        cross_attention_blocks(openflamingo, 3)
