"""Compare the kernels as nvcc compiled them, executed on the CPU by csrc/emulator, with float64.

The last tests check the checks: changed PTX must be caught.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from tests.ops import emulator as emulation
from tests.ops.cases import PACKED, UNORDERED, cross_case, expect, resampler_case
from tests.ops.ptx_emulator import OPS, PtxEmulator, make_ptx
from tests.ops.ptx_translation import UnknownInstructionError, translate
from tests.ops.test_cuda_source import find_nvcc
from tests.ops.test_emulator import check
from tests.ops.test_emulator_mutations import is_caught

pytestmark = pytest.mark.slow
ARCHITECTURES = ("sm_80", "sm_90a")
INSTANTIATIONS = [(head_dim, dtype) for head_dim in (64, 96, 128) for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture(autouse=True)
def _tools() -> Iterator[None]:
    find_nvcc()
    if (reason := emulation.why_unavailable()) is not None:
        pytest.skip(reason)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "dtype"), INSTANTIATIONS, ids=str)
def test_compiled_kernels_are_as_exact_as_plain_torch(head_dim: int, dtype: torch.dtype, architecture: str) -> None:
    emulator = PtxEmulator(head_dim, dtype, architecture)
    same = {"head_dim": head_dim, "dtype": dtype}
    cross = [(64, PACKED, False), (5, PACKED, False), (70, UNORDERED, False), (64, [-1] * 5, False), (64, [7], False)]
    cross += [(64, PACKED, True), (64, UNORDERED, True), (70, UNORDERED, True)]
    resampled = [(7, [64, 65, 1]), (70, [30, 140]), (64, [300, 0, 63]), (64, [0])]
    for copies in ("as late as allowed", "by chance"):
        emulator.copies = copies
        for seed, (num_latents, index, so_far) in enumerate(cross):
            emulator.seed = seed
            options = {"num_media": 8, "num_latents": num_latents, "so_far": so_far, "seed": seed}
            check(emulator, expect(cross_case(index, **options, **same)))
        for seed, (num_latents, lengths) in enumerate(resampled):
            emulator.seed = seed
            check(emulator, expect(resampler_case(lengths, num_latents=num_latents, seed=seed, **same)))
        emulator.splits = 2
        check(emulator, expect(resampler_case([140, 1], num_latents=7, **same)))
        check(emulator, expect(resampler_case([90], num_latents=70, **same)))
        for num_latents in (64, 70):
            case = cross_case([0] * 150 + [2], num_media=3, num_latents=num_latents, num_kv_heads=1, **same)
            check(emulator, expect(case))
        emulator.splits = 1


def _swap_operands(ptx: str) -> str:
    return re.sub(r"(cvt\.rn\.bf16x2\.f32 %r\d+, )(%f\d+), (%f\d+)", r"\1\3, \2", ptx)


def _drop_last(pattern: str, replacement: str) -> object:
    def change(ptx: str) -> str:
        *_, last = re.finditer(pattern, ptx)
        return ptx[: last.start()] + last.expand(replacement) + ptx[last.end() :]

    return change


MUTANTS = {
    "operands of a conversion swapped": _swap_operands,
    "a matrix not transposed": _drop_last(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
    "a wait that waits for nothing": lambda ptx: re.sub(r"cp\.async\.wait_group 0", "cp.async.wait_group 2", ptx),
    "no barrier": lambda ptx: re.sub(r"bar\.sync \t?0;|barrier\.sync \t?0;", "", ptx),
    "a comparison off by one": lambda ptx: re.sub(r"setp\.lt\.s32", "setp.le.s32", ptx),
}


MUTANTS_OF_WARPGROUPS = {
    "copies not published": lambda ptx: ptx.replace("fence.proxy.async.shared::cta;", ""),
    "no wait for products": lambda ptx: ptx.replace("wgmma.wait_group.sync.aligned 0;", ""),
    "values not transposed": lambda ptx: re.sub(r"(wgmma\.mma_async[^;]*, adds, 1, 1), 1;", r"\1, 0;", ptx),
}


@pytest.mark.parametrize("name", MUTANTS_OF_WARPGROUPS)
def test_changed_ptx_of_warpgroups_is_caught(name: str) -> None:
    change = MUTANTS_OF_WARPGROUPS[name]
    original = make_ptx(OPS[0], 64, torch.bfloat16, "sm_90a")
    assert change(original) != original, "the mutant no longer fits what nvcc emits"
    assert is_caught(PtxEmulator(64, torch.bfloat16, "sm_90a", change), seeds=1)


@pytest.mark.parametrize("name", MUTANTS)
def test_changed_ptx_is_caught(name: str) -> None:
    original = make_ptx(OPS[0], 64, torch.bfloat16, "sm_80")
    change = MUTANTS[name]
    assert change(original) != original, "the mutant no longer fits what nvcc emits"  # type: ignore[operator]
    assert is_caught(PtxEmulator(64, torch.bfloat16, "sm_80", change), seeds=1)  # type: ignore[arg-type]


def test_an_unknown_instruction_is_named() -> None:
    kernel = ".visible .entry kernel(\n.param .b8 kernel_param_0[8]\n)\n{\n{body}\n}\n"
    with pytest.raises(UnknownInstructionError, match="tcgen05"):
        translate(kernel.replace("{body}", "\ttcgen05.mma.cta_group [%r1], %r2;\n"))
