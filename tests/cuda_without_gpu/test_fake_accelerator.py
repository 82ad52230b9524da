"""Check that nothing waits for a GPU within a micro-step, and that every tensor is on it, without a GPU."""

from __future__ import annotations

import pytest

from tests.cuda_without_gpu.cases import cases, put_back, run_all
from tests.cuda_without_gpu.fake_accelerator import Watch
from tests.distributed.processes import run_distributed


@pytest.fixture(scope="module")
def watches() -> dict[str, Watch]:
    """Return what each case did; all run in one process."""
    [found] = run_distributed(run_all, 1)
    return found


@pytest.mark.parametrize("name", [*cases(), "logits"])
def test_nothing_waits_and_every_tensor_is_on_the_accelerator(name: str, watches: dict[str, Watch]) -> None:
    watch = watches[name]
    assert (watch.failure, watch.waits) == (None, [])
    assert watch.kernels.total() > 100


@pytest.mark.parametrize("name", put_back())
def test_a_defect_that_is_put_back_is_found(name: str, watches: dict[str, Watch]) -> None:
    watch = watches[name]
    if name.startswith("1:"):
        assert watch.failure is not None and "same device" in watch.failure
    else:
        assert watch.failure is None and watch.waits


def test_the_host_has_less_to_do_at_3b(watches: dict[str, Watch]) -> None:
    """Before, a micro-step launched 8,637 kernels, and ZeRO-3 hooked 1,087 modules with parameters."""
    watch = watches["3b, padded"]
    print(f"3b: {watch.kernels.total()} kernels, {watch.hooked} hooked modules")
    assert watch.kernels.total() < 7_300
    assert watch.hooked < 1_087 / 3


@pytest.mark.parametrize("name", ["debug, packed", "debug, packed, attend all", "3b, padded"])
def test_the_ranges_of_tokens_are_found_once_a_batch(name: str, watches: dict[str, Watch]) -> None:
    kernels = watches[name].kernels
    assert kernels["masked_cross_attention_backward"] > 1
    assert kernels["media_token_ranges"] == 1


def test_decoding_waits_in_transformers_only(watches: dict[str, Watch]) -> None:
    """Prompts are copied before the first token and tokens after the last one; between them only transformers reads."""
    watch = watches["generation"]
    assert watch.failure is None
    places = [wait.partition(" at ")[2].partition(" < ")[0] for wait in watch.waits]
    assert places[-1].split(":")[0].endswith("model/generation.py")
    own = {place.split(":")[0].rpartition("model/")[2] for place in places if not place.startswith("transformers/")}
    assert own <= {"generation.py", "seen_media.py"}
