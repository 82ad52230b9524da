"""Check the choice of the backend, the ops under torch's modes, and the errors for bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model import ops
from model.ops import dispatch
from tests.ops.cases import PACKED, cross_case, resampler_case, run_cross, run_resampler

fused_only = pytest.mark.usefixtures("cpu_library")


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAMINGO_OPS", raising=False)
    monkeypatch.setattr(dispatch, "_configured", None)


def uses_fused(**options: str) -> bool:
    return dispatch.use_fused("masked_cross_attention", torch.zeros(1, 1, 64), options.get("backend"))


@fused_only
def test_arguments_override_the_setting_which_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_fused()
    monkeypatch.setenv("FLAMINGO_OPS", "reference")
    assert not uses_fused()
    ops.set_backend("auto")
    assert ops.get_backend() == "reference", "a run's default leaves the choice to the environment"
    ops.set_backend("fused")
    assert uses_fused()
    assert not uses_fused(backend="reference")


def test_unknown_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"auto, fused, reference.*'cuda'"):
        ops.set_backend("cuda")
    with pytest.raises(ValueError, match="backend must be None or one of"):
        uses_fused(backend="fast")
    monkeypatch.setenv("FLAMINGO_OPS", "yes")
    with pytest.raises(ValueError, match="FLAMINGO_OPS must be one of"):
        uses_fused()


@fused_only
def test_inputs_that_no_kernel_covers_fall_back_or_are_refused_on_request() -> None:
    case = cross_case([0, 0], num_media=1, head_dim=24)
    assert run_cross(ops.masked_cross_attention, case)[0].shape == case.q.shape
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of 16, not 24"):
        run_cross(ops.masked_cross_attention, case, backend="fused")
    with pytest.raises(RuntimeError, match=r"no kernels for torch\.float64 on cpu"):
        run_cross(ops.masked_cross_attention, case, torch.float64, backend="fused")


def test_status_has_a_reason_for_every_backend() -> None:
    rows = ops.status()
    assert {row.op for row in rows} == set(dispatch.OPS)
    assert {row.backend for row in rows} == {"fused on cpu", "fused on cuda", "reference"}
    assert all(row.reason for row in rows)


@pytest.mark.slow
def test_without_compiled_libraries_everything_still_works() -> None:
    script = (
        "import torch; from model import ops\n"
        "q, k = torch.ones(2, 1, 64), torch.ones(1, 4, 1, 64)\n"
        "print(ops.masked_cross_attention(q, k, k, torch.tensor([0, -1]))[:, 0, 0].tolist())\n"
        "print([row.reason for row in ops.status() if row.backend == 'fused on cpu'][0])\n"
    )
    environment = {**os.environ, "FLAMINGO_OPS_LIBRARY": "none"}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.splitlines() == ["[1.0, 0.0]", "FLAMINGO_OPS_LIBRARY=none"]


@fused_only
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_autocast_computes_in_its_type_and_returns_gradients_in_the_inputs(backend: str) -> None:
    case, media = cross_case(PACKED[:60], num_media=8), resampler_case([30, 5])
    with torch.autocast("cpu", torch.bfloat16):
        out, dq, *_, dgate = run_cross(ops.masked_cross_attention, case, backend=backend)
        resampled, *grads = run_resampler(ops.resampler_attention, media, backend=backend)
    assert out.dtype == resampled.dtype == torch.bfloat16
    assert {x.dtype for x in (dq, dgate, *grads)} == {torch.float32}


@fused_only
def test_the_dispatcher_ops_follow_autocast() -> None:
    case, media = cross_case(PACKED[:60], num_media=8), resampler_case([30, 5])
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.flamingo.masked_cross_attention(*case[:5], None, 0.1)
        resampled, lse = torch.ops.flamingo.resampler_attention(*media[:6], 0.1)
    assert (out.dtype, resampled.dtype, lse.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@fused_only
def test_compiled_functions_are_one_graph_and_equal_eager() -> None:
    case, media = cross_case(PACKED[:60], num_media=8, so_far=True), resampler_case([30, 5])
    cross = torch.compile(ops.masked_cross_attention, fullgraph=True, backend="aot_eager")
    resampler = torch.compile(ops.resampler_attention, fullgraph=True, backend="aot_eager")
    pairs = (
        (run_cross(cross, case), run_cross(ops.masked_cross_attention, case)),
        (run_resampler(resampler, media), run_resampler(ops.resampler_attention, media)),
    )
    for compiled, eager in pairs:
        assert all(torch.equal(x, y) for x, y in zip(compiled, eager, strict=True))


@fused_only
def test_activation_checkpointing_gives_the_same_gradients() -> None:
    def checkpointed(*args: Any, **options: Any) -> torch.Tensor:
        return checkpoint(ops.masked_cross_attention, *args, use_reentrant=False, **options)  # type: ignore[no-any-return]

    case = cross_case(PACKED[:60], num_media=8)
    pairs = zip(run_cross(checkpointed, case), run_cross(ops.masked_cross_attention, case), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_meta_tensors_have_the_shapes_of_the_results() -> None:
    case, media = cross_case([0, 0], num_media=2), resampler_case([3])
    out = ops.masked_cross_attention(*(x.to("meta") for x in case[:4]))
    assert out.shape == case.q.shape
    assert ops.resampler_attention(*(x.to("meta") for x in media[:6])).shape == media.q.shape


CROSS_ERRORS = [
    ({"q": torch.zeros(4, 64)}, ValueError, r"q must be \[T, H, K\]"),
    ({"q": torch.zeros(4, 2, 64, dtype=torch.int32)}, TypeError, "q must be floating point"),
    ({"k": torch.zeros(3, 5, 2, 32)}, ValueError, r"k must be \[M, R, U, K\] with K = 64"),
    ({"k": torch.zeros(3, 5, 1, 64)}, ValueError, r"v must be .* with M = 3, R = 5, U = 1"),
    ({"k": torch.zeros(3, 5, 3, 64), "v": torch.zeros(3, 5, 3, 64)}, ValueError, "heads that divide those of q, 2"),
    ({"k": torch.zeros(3, 5, 0, 64), "v": torch.zeros(3, 5, 0, 64)}, ValueError, "heads that divide those of q, 2"),
    ({"v": torch.zeros(2, 5, 2, 64)}, ValueError, r"v must be .* with M = 3"),
    ({"v": torch.zeros(3, 5, 2, 64, dtype=torch.bfloat16)}, TypeError, "v must have the dtype of q"),
    ({"k": torch.zeros(3, 5, 2, 64, device="meta")}, ValueError, "k must be on the device of q"),
    ({"media_index": torch.zeros(4)}, TypeError, "media_index must be int32 or int64"),
    ({"media_index": torch.zeros(5, dtype=torch.int64)}, ValueError, r"media_index must be \[T\] with T = 4"),
    ({"media_index": torch.tensor([0, 1, 2, 3])}, ValueError, r"media_index must be -1 \(none\) to 2"),
    ({"media_index": torch.tensor([0, -2, 2, 2])}, ValueError, "got -2 to 2"),
    ({"first_media": torch.tensor([1, 0, 0, 0])}, ValueError, "first_media must be 0 to media_index"),
    ({"token_ranges": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "token_ranges must be int32"),
    ({"token_ranges": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"token_ranges must be .* with M = 3"),
    (
        {"token_ranges": torch.zeros(2, 3, dtype=torch.int32, device="meta")},
        ValueError,
        "token_ranges must be on the device of k",
    ),
    ({"gate": torch.zeros(2)}, ValueError, "gate must be one floating-point value"),
    ({"scale": -1.0}, ValueError, "scale must be positive"),
    ({"k": torch.zeros(3, 0, 2, 64), "v": torch.zeros(3, 0, 2, 64)}, ValueError, "at least one latent"),
    ({"k": torch.zeros(0, 5, 2, 64), "v": torch.zeros(0, 5, 2, 64)}, ValueError, "media_index must be"),
    (
        {"k": torch.zeros(1).expand(2**27, 16, 2, 64), "v": torch.zeros(1).expand(2**27, 16, 2, 64)},
        ValueError,
        r"fewer than 2\*\*31 rows",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), CROSS_ERRORS, ids=[message for *_, message in CROSS_ERRORS])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_bad_arguments_of_cross_attention_are_named(
    change: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    good = {
        "q": torch.zeros(4, 2, 64),
        "k": torch.zeros(3, 5, 2, 64),
        "v": torch.zeros(3, 5, 2, 64),
        "media_index": torch.tensor([0, 0, 2, 2]),
    }
    with pytest.raises(error, match=message):
        ops.masked_cross_attention(**{**good, **change}, backend=backend)


RESAMPLER_ERRORS = [
    ({"q": torch.zeros(3, 2, 64)}, ValueError, r"q must be \[M, R, H, K\]"),
    ({"k_features": torch.zeros(9, 1, 64)}, ValueError, r"k_features must be \[S, H, K\] with H = 2"),
    ({"v_features": torch.zeros(8, 2, 64)}, ValueError, "v_features must be .* with S = 9"),
    ({"k_latents": torch.zeros(2, 5, 2, 64)}, ValueError, "k_latents must be .* with M = 2, R = 4"),
    ({"cu_media": torch.tensor([0, 9])}, ValueError, r"cu_media must be \[M \+ 1\] with M \+ 1 = 3"),
    ({"cu_media": torch.tensor([0, 9, 8])}, ValueError, "cu_media must go from 0 to S = 9"),
    ({"cu_media": torch.tensor([0, 12, 9])}, ValueError, "cu_media must not decrease"),
    ({"cu_media": torch.tensor([0.0, 4.0, 9.0])}, TypeError, "cu_media must be int32 or int64"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), RESAMPLER_ERRORS, ids=[message for *_, message in RESAMPLER_ERRORS]
)
def test_bad_arguments_of_resampler_attention_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {
        "q": torch.zeros(2, 4, 2, 64),
        "k_features": torch.zeros(9, 2, 64),
        "v_features": torch.zeros(9, 2, 64),
        "k_latents": torch.zeros(2, 4, 2, 64),
        "v_latents": torch.zeros(2, 4, 2, 64),
        "cu_media": torch.tensor([0, 4, 9]),
    }
    with pytest.raises(error, match=message):
        ops.resampler_attention(**{**good, **change})


@fused_only
@pytest.mark.parametrize("index", [[3], [-2]])
def test_the_dispatcher_op_itself_refuses_an_index_out_of_range(index: list[int]) -> None:
    case = cross_case([0], num_media=3)
    with pytest.raises(RuntimeError, match=r"media_index\[0\] is"):
        torch.ops.flamingo.masked_cross_attention(*case[:3], torch.tensor(index), None, None, 0.1)
