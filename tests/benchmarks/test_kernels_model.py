"""Test the model of the CUDA kernels: reading machine code, following its paths, and playing them. No GPU is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trainer.benchmark import __main__ as benchmark
from trainer.benchmark import kernels, kernels_model, multiprocessor_model, sass, sass_paths
from trainer.benchmark.attention_baselines import CrossShape, ResamplerShape

CODE = """
    LDG.E R2, desc[UR4][R2.64]
    @!P0 BRA `(.L_x_1)
    CALL.ABS.NOINC R4
.L_x_1:
    LDGSTS.E.BYPASS.128 [R1], desc[UR4][R6.64]
    LDGDEPBAR
.L_x_2:
    DEPBAR.LE SB0, 0x0
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P1 BRA `(.L_x_3)
    LDGSTS.E.BYPASS.128 [R1], desc[UR4][R6.64]
.L_x_3:
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    @P2 BRA `(.L_x_2)
    STG.E.128 desc[UR4][R2.64], R4
    EXIT
"""


def disassembly(code: str = CODE) -> list[str]:
    """Return code as nvdisasm prints it: two words of 64 bits an instruction. All stall for two cycles."""
    lines = ['    .section .text.kernel,"ax",@progbits']
    for line in code.strip().splitlines():
        if line.startswith("."):
            lines.append(line)
            continue
        control = 2 << 41 | 7 << 46 | 7 << 49
        lines.append(f"        /*0010*/  {line.strip()} ;  /* 0x{1:016x} */")
        lines.append(f"                                    /* 0x{control:016x} */")
    return lines


@pytest.fixture
def kernel() -> sass.Kernel:
    return sass.Kernel("kernel", 64, 0, sass._parse(disassembly())["kernel"])


def test_instructions_are_read(kernel: sass.Kernel) -> None:
    assert [x.name for x in kernel.code][:3] == ["LDG", "BRA", "CALL"]
    branch = kernel.code[1]
    assert (branch.target, branch.conditional, branch.stall, branch.write_barrier) == (3, True, 2, 7)


def test_a_path_visits_the_tiles_and_copies_one_less(kernel: sass.Kernel) -> None:
    assert sass_paths.main_loops(kernel) == [sass_paths.Loop(5, 10)]
    for tiles in (1, 2, 5):
        names = [kernel.code[i].name for i in sass_paths.issued(kernel, 64, tiles)]
        assert "CALL" not in names and names[-1] == "EXIT"
        assert names.count("HMMA") == tiles and names.count("LDGSTS") == tiles


def test_a_loop_that_is_left_by_a_call_is_followed() -> None:
    """So does ptxas for sm_80: the call has a condition, and the next instruction jumps back."""
    left = "@!P2 CALL.REL.NOINC `(.L_x_4)\n    BRA `(.L_x_2)\n.L_x_4:"
    code = sass._parse(disassembly(CODE.replace("@P2 BRA `(.L_x_2)", left)))["kernel"]
    kernel = sass.Kernel("kernel", 64, 0, code)
    for tiles in (1, 2, 5):
        names = [code[i].name for i in sass_paths.issued(kernel, 64, tiles)]
        assert names.count("HMMA") == tiles and names.count("LDGSTS") == tiles and names[-1] == "EXIT"


def test_more_resident_blocks_hide_latency_and_misses_cost(kernel: sass.Kernel) -> None:
    blocks = [sass_paths.issued(kernel, 64, 3)] * 24
    alone, four = (multiprocessor_model.seconds(kernel, blocks, resident, 0.0) for resident in (1, 4))
    assert alone / 4.5 < four < alone / 2
    assert multiprocessor_model.seconds(kernel, blocks, 4, 1.0) > 1.2 * four
    assert multiprocessor_model.seconds(kernel, blocks[:12], 1, 0.0) == pytest.approx(alone / 2, rel=0.05)


def test_a_wait_leaves_the_newest_groups_of_copies_on_their_way(kernel: sass.Kernel) -> None:
    code = sass._parse(disassembly(CODE.replace("SB0, 0x0", "SB0, 0x1")))["kernel"]
    paths = [sass_paths.issued(kernel, 64, 1)]
    all_groups, all_but_one = (
        multiprocessor_model.seconds(sass.Kernel("kernel", 64, 0, instructions), paths, 1, 1.0)
        for instructions in (kernel.code, code)
    )
    assert all_but_one < all_groups - 300 / multiprocessor_model.CLOCK


def group_kernel(left: str, end: str = "WARPGROUP.DEPBAR.LE gsb0, 0x0") -> sass.Kernel:
    """Return the kernel with eight products of a warpgroup in place of one of a warp."""
    products = "\n    ".join([f"HGMMA.64x64x16.F32.BF16 R24, {left}gdesc[UR8], R24"] * 8)
    code = CODE.replace("HMMA.16816.F32.BF16 R4, R8, R12, R4", f"WARPGROUP.ARRIVE\n    {products}\n    {end}")
    return sass.Kernel("kernel", 64, 0, sass._parse(disassembly(code))["kernel"])


def test_products_of_a_warpgroup_count_and_take_their_time() -> None:
    shared, registers = group_kernel(""), group_kernel("R8, ")
    assert sass_paths.products_a_tile(shared, 64) == 8 * 8 / 32
    paths = [sass_paths.issued(shared, 64, 3)] * 24
    unwaited, waited = (
        multiprocessor_model.seconds(kernel, paths, 1, 0.0) * multiprocessor_model.CLOCK / 24
        for kernel in (group_kernel("", "NOP"), shared)
    )
    assert waited > unwaited + 100, "the warps wait for what they have issued"
    many = multiprocessor_model.seconds(registers, paths, 8, 0.0) * multiprocessor_model.CLOCK / 24
    assert 3 * 8 * 32 < many < waited, "64 x 64 x 16 multiply-adds take 32 cycles"


def test_a_store_of_one_word_a_lane_sends_a_quarter_of_the_bytes() -> None:
    def with_store(modifiers: str) -> sass.Kernel:
        text = "\n    ".join([f"STG.E{modifiers} desc[UR4][R2.64], R4"] * 50)
        code = CODE.replace("STG.E.128 desc[UR4][R2.64], R4", text)
        return sass.Kernel("kernel", 64, 0, sass._parse(disassembly(code))["kernel"])

    whole, half, word = (
        multiprocessor_model.seconds(kernel, [sass_paths.issued(kernel, 64, 1)] * 24, 1, 0.0)
        for kernel in map(with_store, (".128", ".64", ""))
    )
    assert whole > 1.5 * half > 2 * word


def test_registers_and_shared_memory_limit_the_blocks(kernel: sass.Kernel) -> None:
    assert multiprocessor_model.resident_blocks(kernel, 40 * 1024, "sm_80") == 4
    assert multiprocessor_model.resident_blocks(kernel, 40 * 1024, "sm_90a") == 5
    assert multiprocessor_model.resident_blocks(sass.Kernel("k", 168, 0, ()), 0, "sm_90a") == 3


def test_launches_visit_the_tiles_of_the_shape() -> None:
    [forward], [backward] = kernels_model.cross_launches(CrossShape(8, 2048, 16, 16, 64))
    assert forward.visits == (1,) * 256, "media end at tiles"
    assert backward.visits == (2,) * 128 and backward.flags == (True, False)
    [uneven], _ = kernels_model.cross_launches(CrossShape(8, 2048, 16, 16, 64, uneven=True))
    assert set(uneven.visits) == {1, 2}
    _, (rows, keys, _) = kernels_model.cross_launches(CrossShape(1, 128, 1, 8, 128, num_latents=130, num_kv_heads=2))
    assert (rows.visits, rows.heads, rows.passes) == ((3, 3), 8, 2)
    assert (keys.visits, keys.heads, keys.flags) == ((2 * 4,) * 3, 2, (False, True))
    [resampled], _ = kernels_model.resampler_launches(ResamplerShape(3, 130, 2, 64))
    assert resampled.visits == (4, 4, 4)


def test_a_block_starts_where_one_ends_first() -> None:
    assert kernels_model.busiest([4] * 132 + [1] * 132, 1, int) == [4, 1]
    assert kernels_model.busiest([1] * 131 + [4] + [2] * 131, 1, int) == [4]
    assert kernels_model.busiest([1] * 132 + [2], 2, int) == [1, 2]


def test_the_longest_media_come_first_with_all_heads() -> None:
    uneven = CrossShape(1, 640, 4, 2, 64, uneven=True)  # 64, 128, 192 and 256 tokens
    _, [backward] = kernels_model.cross_launches(uneven)
    assert backward.block_visits() == [4, 4, 3, 3, 2, 2, 1, 1]
    _, [wide] = kernels_model.cross_launches(CrossShape(1, 640, 4, 2, 128, uneven=True))
    assert wide.block_visits() == [1, 2, 3, 4] * 2


def test_launches_of_long_media_are_split_and_summed() -> None:
    launches = kernels_model.resampler_launches(ResamplerShape(2, 2048, 32, 64))
    for (split, combine), flags in zip(launches, ((True,), (True, True)), strict=True):
        assert (split.visits, split.heads, split.flags) == ((33, 33), 32, flags)
        assert split.block_visits() == [6] * 3 * 64 + [5] * 3 * 64
        assert (len(combine.visits), combine.input_bytes) == (2 * 64 * 32 * 8 // 128, 6 * 4 * 2 * 64 * 32 * 64)
    _, (split, combine) = kernels_model.cross_launches(CrossShape(8, 2048, 1, 16, 64))
    assert (split.block_visits(), split.flags) == ([11] * 2 * 8 * 16 + [10] * 8 * 16, (True, True))
    assert (len(combine.visits), combine.input_bytes) == (2 * 8 * 64 * 16 * 8 // 128, 3 * 4 * 2 * 8 * 64 * 16 * 64)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    kernels_model._kernels.cache_clear()
    assert benchmark.main(["kernels", "--device", "model"]) == 2
    assert "CUDA_HOME" in capsys.readouterr().err
    assert benchmark.main(["data", "--device", "model"]) == 2
    assert "only kernels has one" in capsys.readouterr().err


def test_rows_are_marked_as_modeled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: sass.Kernel) -> None:
    monkeypatch.setattr(kernels, "CROSS_SHAPES", {"cuda": [CrossShape(1, 128, 2, 2, 64)]})
    monkeypatch.setattr(kernels, "RESAMPLER_SHAPES", {"cuda": []})
    monkeypatch.setattr(kernels, "LONG_SHAPES", ([], []))
    monkeypatch.setattr(kernels_model, "_kernels", lambda op, head_dim: [])
    monkeypatch.setattr(kernels_model, "find_kernel", lambda launch, compiled: kernel)
    assert benchmark.main(["kernels", "--device", "model", "--json", str(tmp_path / "rows.json")]) == 0
    header, forward, backward = json.loads((tmp_path / "rows.json").read_text())
    assert header["device"] == "model" and "nothing was measured" in header["modeled"]
    assert [row["measure"] for row in (forward, backward)] == ["forward, modeled", "backward, modeled"]
    assert 0 < forward["ratio"] < 1 and forward["target"] == 0.7


@pytest.mark.slow
def test_the_paths_of_compiled_kernels_compute_all_products() -> None:
    """A forward has two products of a tile, a backward of one kernel has five; on sm_90a warpgroups compute some."""
    try:
        compiled = sass.compiled("masked_cross_attention_64_bf16", "sm_90a")
    except sass.ToolMissingError as error:
        pytest.skip(str(error))
    found = {x.name: sass_paths.products_a_tile(x, 64) for x in compiled if sass_paths.main_loops(x)}
    expected = {"attention_forward": 2, "backward_rows": 5}
    expected |= {f"ELi64ELb{alone}ELb{split}EEEvNS0_20": 4 + alone for alone in (0, 1) for split in (0, 1)}
    for part, products in expected.items():
        assert [count for name, count in found.items() if part in name] == [products], part
