"""Check that every private name of ``model.internals`` still exists and still does what the package needs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from model import internals
from model.ops import library
from tests.model.builders import FAMILIES


def test_fake_tensors_have_shapes_and_no_values() -> None:
    with internals.FakeTensorMode():
        fake = torch.zeros(3, 4) + 1
    assert isinstance(fake, internals.FakeTensor)
    assert fake.shape == (3, 4)
    with pytest.raises(RuntimeError):
        float(fake.sum())


def test_a_dispatch_mode_sees_every_op() -> None:
    seen = []

    class Recorder(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


@pytest.mark.parametrize("fake", [False, True])
def test_views_share_the_id_of_their_storage(fake: bool) -> None:
    with internals.FakeTensorMode() if fake else torch.no_grad():
        tensor, other = torch.zeros(4), torch.zeros(4)
    assert internals.storage_id(tensor[1:]) == internals.storage_id(tensor) != internals.storage_id(other)


def test_tensors_of_nested_containers_are_listed_in_order() -> None:
    a, b, c = torch.zeros(3).unbind()
    found = internals.list_tensors(([a, "text"], {"key": (b, None)}, c))
    assert len(found) == 3
    assert all(x is y for x, y in zip(found, (a, b, c), strict=True))


def test_autocast_implementations_can_call_their_own_op() -> None:
    reason = library.load_errors()["cpu"]
    if reason is not None:
        pytest.skip(f"CPU kernels: {reason}")
    x = torch.ones(1, 1, 1, 16)
    with torch.autocast("cpu", torch.bfloat16), internals.disable_autocast_key("cpu"):
        out = torch.ops.flamingo.masked_cross_attention(x[0], x, x, torch.zeros(1, dtype=torch.int64), None, None, 1.0)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_attention_implementation_can_be_read(name: str) -> None:
    settings = dict(FAMILIES["llama"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    assert internals.attention_implementation(lm.config) == name


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_attention_takes_offsets(name: str) -> None:
    config = AutoConfig.for_model(**FAMILIES["llama"])
    assert not internals.takes_document_offsets(config)
    config._attn_implementation = name
    assert internals.takes_document_offsets(config)


def test_documents_are_numbered_as_by_transformers() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    with internals.known_packing(True):
        known = masking_utils.find_packed_sequence_indices(positions)
    with internals.known_packing(False):
        assert masking_utils.find_packed_sequence_indices(positions) is None
    found = masking_utils.find_packed_sequence_indices(positions)
    assert torch.equal(known, found)
    assert masking_utils.find_packed_sequence_indices(torch.arange(6)[None]) is None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_known_packing_is_still_needed(family: str) -> None:
    """Fail once transformers reads no value where there is no mask; a tensor on the meta device has none."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]))
        ids = torch.ones(1, 6, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="meta"):
            lm(input_ids=ids, use_cache=False)
        for is_packed in (False, True):
            with internals.known_packing(is_packed):
                lm(input_ids=ids, use_cache=False)


def test_changes_in_place_count() -> None:
    tensor = torch.zeros(3)
    before = internals.tensor_version(tensor)
    tensor.data = torch.ones(3)  # as ZeRO-3 gathers
    assert internals.tensor_version(tensor) == before
    tensor.add_(1)
    assert internals.tensor_version(tensor) > before
    with torch.inference_mode():
        assert internals.tensor_version(torch.zeros(3)) == 0
