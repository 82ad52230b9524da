"""Compare the CUDA kernels, executed on the CPU by csrc/emulator, with float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.ops.cases import (
    PACKED,
    UNORDERED,
    Expected,
    ResamplerCase,
    assert_as_good_as,
    cross_case,
    expect,
    resampler_case,
)
from tests.ops.emulator import COPIES, EmulationError, Emulator
from trainer.benchmark.attention_baselines import CrossShape, ResamplerShape
from trainer.benchmark.kernels_model import cross_splits, resampler_splits

TYPES_AND_HEAD_DIMS = [
    (torch.bfloat16, 64),
    (torch.bfloat16, 96),
    (torch.bfloat16, 128),
    (torch.float16, 64),
    (torch.float16, 128),
]


def check(emulator: Emulator, expected: Expected) -> None:
    case = expected.case
    if isinstance(case, ResamplerCase):
        results = emulator.resampler(*case)
    else:
        out_scale = None if case.gate is None else case.gate.tanh()
        *results, d_scale = emulator.cross_attention(*case[:5], out_scale, case.grad)
        if case.gate is not None:
            results.append((d_scale * (1 - case.gate.tanh() ** 2)).view(1))
    assert_as_good_as(tuple(results), expected)


@pytest.mark.parametrize(("dtype", "head_dim"), TYPES_AND_HEAD_DIMS, ids=str)
@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_cross_attention(emulator: Emulator, dtype: torch.dtype, head_dim: int, so_far: bool) -> None:
    for seed, (num_latents, index) in enumerate(((64, PACKED), (5, UNORDERED), (70, PACKED[:130]))):
        emulator.seed, emulator.copies = seed, list(COPIES)[seed]
        case = cross_case(
            index, num_media=8, num_latents=num_latents, head_dim=head_dim, dtype=dtype, so_far=so_far, seed=seed
        )
        check(emulator, expect(case))


@pytest.mark.parametrize(("dtype", "head_dim"), TYPES_AND_HEAD_DIMS, ids=str)
def test_resampler(emulator: Emulator, dtype: torch.dtype, head_dim: int) -> None:
    for seed, (num_latents, lengths) in enumerate(((64, [200, 0, 63]), (7, [64, 65, 1]), (70, [30, 140]))):
        emulator.seed, emulator.copies = seed, list(COPIES)[seed]
        check(
            emulator,
            expect(resampler_case(lengths, num_latents=num_latents, head_dim=head_dim, dtype=dtype, seed=seed)),
        )


@pytest.fixture
def splitting(emulator: Emulator) -> Iterator[Emulator]:
    yield emulator
    emulator.splits = 1


@pytest.mark.parametrize(("dtype", "head_dim"), TYPES_AND_HEAD_DIMS, ids=str)
def test_a_resampler_whose_keys_are_split(splitting: Emulator, dtype: torch.dtype, head_dim: int) -> None:
    """A medium of up to 64 features has two blocks of keys, so some of seven splits get none."""
    cases = ((64, [200, 0, 63], 2), (70, [30, 140], 3), (7, [300, 9], 7))
    for seed, (num_latents, lengths, splits) in enumerate(cases):
        splitting.seed, splitting.copies, splitting.splits = seed, list(COPIES)[seed], splits
        options = {"num_latents": num_latents, "head_dim": head_dim, "dtype": dtype, "seed": seed}
        check(splitting, expect(resampler_case(lengths, **options)))


@pytest.mark.parametrize(("dtype", "head_dim"), TYPES_AND_HEAD_DIMS, ids=str)
def test_a_cross_attention_whose_rows_are_split(splitting: Emulator, dtype: torch.dtype, head_dim: int) -> None:
    """Of three splits of a medium that one row or none sees, some get no row."""
    text = [0] * 200 + [-1, 2]
    cases = ((text, 2, None, 64), (PACKED, 3, 2, 63), (UNORDERED, 3, 1, 62), (text, 3, 1, 70))
    for seed, (index, splits, num_kv_heads, num_latents) in enumerate(cases):
        splitting.seed, splitting.copies, splitting.splits = seed, list(COPIES)[seed % len(COPIES)], splits
        options = {"num_kv_heads": num_kv_heads, "num_latents": num_latents, "head_dim": head_dim, "dtype": dtype}
        check(splitting, expect(cross_case(index, num_media=8, num_heads=2, seed=seed, **options)))


def test_splits_do_not_depend_on_the_order_of_warps(splitting: Emulator) -> None:
    case, runs = resampler_case([400], dtype=torch.bfloat16), []
    text = cross_case([0] * 300, num_media=1, dtype=torch.bfloat16)
    splitting.splits = 3
    for seed in range(3):
        splitting.seed = seed
        runs.append([*splitting.resampler(*case), *splitting.cross_attention(*text[:5], None, text.grad)])
    for results in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], results, strict=True))


def test_the_number_of_splits_is_that_of_the_model(emulator: Emulator) -> None:
    found = []
    for media, features, heads, latents in itertools.product((1, 4, 40), (0, 256, 2048), (2, 16), (5, 64, 130)):
        shape = ResamplerShape(media, features, heads, 64, latents)
        found.append(emulator.resampler_splits(media, latents, media * features, heads))
        assert found[-1] == resampler_splits(shape), shape
        text = CrossShape(2, max(features, media), media, heads, 64, latents, num_kv_heads=heads // 2)
        found.append(emulator.cross_splits(2 * text.length, 2 * media, latents, heads, heads // 2))
        assert found[-1] == cross_splits(text), text
    assert min(found) == 1 and max(found) > 6
    assert emulator.resampler_splits(4, 64, 4 * 2048, 16) == 6 and emulator.resampler_splits(40, 64, 40 * 256, 16) == 1
    assert emulator.cross_splits(8 * 2048, 8, 64, 16, 16) == 3
    assert emulator.resampler_splits(0, 64, 0, 16) == 1 and emulator.cross_splits(64, 0, 64, 16, 16) == 1, "no media"


@pytest.mark.parametrize(("so_far", "num_kv_heads"), [(False, 2), (True, 1)], ids=["one medium", "so far"])
def test_heads_that_share_keys(emulator: Emulator, so_far: bool, num_kv_heads: int) -> None:
    options = {"num_heads": 4, "num_kv_heads": num_kv_heads, "dtype": torch.bfloat16, "so_far": so_far}
    case = cross_case(PACKED[40:130], num_media=3, **options)
    check(emulator, expect(case))
    repeated = case._replace(k=repeat_heads(case.k, 4), v=repeat_heads(case.v, 4))
    shared, plain = (emulator.cross_attention(*x[:5], None, x.grad) for x in (case, repeated))
    assert all(torch.equal(x, y) for x, y in zip(shared[:2], plain[:2], strict=True)), "output and dq"


def repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[2], 2)


@pytest.mark.slow
@pytest.mark.long
def test_a_medium_of_6404_keys(emulator: Emulator) -> None:
    """Llama 3.2 Vision has so many: four tiles of 1,601 patches."""
    options = {"num_heads": 2, "num_kv_heads": 1, "num_latents": 6404, "dtype": torch.bfloat16}
    check(emulator, expect(cross_case([0, -1, 0], num_media=1, **options)))


@pytest.mark.slow
@pytest.mark.long
def test_more_media_than_a_grid_has_blocks_in_y(emulator: Emulator) -> None:
    """A grid has 65,535; the kernel that owns keys is then launched twice."""
    index = [0, 0, 7, 65_534, 65_535, 65_536, 65_536]
    case = cross_case(index, num_media=65_537, num_latents=1, num_heads=1, dtype=torch.bfloat16)
    check(emulator, expect(case))


@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
@pytest.mark.parametrize("index", [PACKED, UNORDERED, [-1] * 5], ids=["packed", "unordered", "blind"])
def test_the_ranges_of_tokens_are_those_of_the_cpu(
    emulator: Emulator, cpu_library: None, index: list[int], so_far: bool
) -> None:
    case = cross_case(index, num_media=8, num_latents=1, num_heads=1, dtype=torch.bfloat16, so_far=so_far)
    emulator.cross_attention(*case[:5], None, case.grad)
    expected = torch.ops.flamingo.media_token_ranges(case.media_index, case.first_media, 8)
    assert torch.equal(emulator.token_ranges, expected)


@pytest.mark.parametrize("num_media", [8, 1025])
def test_the_longest_media_come_first(emulator: Emulator, num_media: int) -> None:
    """With more than 1,024 media no order pays."""
    case = cross_case(PACKED, num_media=num_media, num_latents=1, num_heads=1, dtype=torch.bfloat16)
    emulator.cross_attention(*case[:5], None, case.grad)
    begin, end = emulator.token_ranges
    longest_first = (end - begin).clamp_min(0).argsort(descending=True, stable=True)
    assert torch.equal(emulator.order.long(), longest_first if num_media == 8 else torch.arange(num_media))


@pytest.mark.parametrize("index", [[-1] * 5, [0], [7], [0, -1] * 40], ids=["blind", "one row", "last medium", "gaps"])
@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_degenerate_indices(emulator: Emulator, index: list[int], so_far: bool) -> None:
    case = cross_case(index, num_media=8, dtype=torch.bfloat16, so_far=so_far)
    check(emulator, expect(case))
    out, dq, *_ = emulator.cross_attention(*case[:5], None, case.grad)
    blind = case.media_index < 0
    assert (out[blind] == 0).all()
    assert (dq[blind] == 0).all()


def test_a_gate_of_zero_has_the_gradient_of_the_ungated_output(emulator: Emulator) -> None:
    check(emulator, expect(cross_case(PACKED[:100], num_media=8, dtype=torch.bfloat16, gate=0.0)))


def test_results_do_not_depend_on_the_order_of_warps(emulator: Emulator) -> None:
    case = cross_case(PACKED, num_media=8, dtype=torch.bfloat16, so_far=True)
    runs = []
    for seed in range(3):
        emulator.seed = seed
        runs.append(emulator.cross_attention(*case[:5], None, case.grad))
    for results in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], results, strict=True))


@pytest.mark.parametrize("index", [[8], [-2]])
def test_a_media_index_out_of_range_is_a_device_assertion(emulator: Emulator, index: list[int]) -> None:
    case = cross_case([0], num_media=8, dtype=torch.bfloat16)._replace(media_index=torch.tensor(index))
    with pytest.raises(EmulationError, match="media_index is out of range"):
        emulator.cross_attention(*case[:5], None, case.grad)


def test_offsets_that_decrease_are_a_device_assertion(emulator: Emulator) -> None:
    case = resampler_case([3, 5], dtype=torch.bfloat16)._replace(cu_media=torch.tensor([0, 9, 8]))
    with pytest.raises(EmulationError, match="cu_media is out of range"):
        emulator.resampler(*case)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_warpgroups(group_emulators: dict[int, Emulator], head_dim: int) -> None:
    groups, options = group_emulators[head_dim], {"head_dim": head_dim, "dtype": torch.bfloat16}
    cross = ((64, PACKED, False), (5, UNORDERED, False), (70, PACKED[:130], True))
    resampled = ((64, [200, 0, 63], 1), (7, [64, 65, 1], 1), (70, [30, 140], 3))
    for seed, (num_latents, index, so_far) in enumerate(cross):
        groups.seed, groups.copies = seed, list(COPIES)[seed]
        more = {"num_media": 8, "num_latents": num_latents, "so_far": so_far, "seed": seed}
        check(groups, expect(cross_case(index, **more, **options)))
    for seed, (num_latents, lengths, splits) in enumerate(resampled):
        groups.seed, groups.copies, groups.splits = seed, list(COPIES)[seed], splits
        check(groups, expect(resampler_case(lengths, num_latents=num_latents, seed=seed, **options)))
    groups.splits = 1


def test_warpgroups_do_not_depend_on_the_order_of_warps(group_emulators: dict[int, Emulator]) -> None:
    case, groups, runs = resampler_case([400], dtype=torch.bfloat16), group_emulators[64], []
    for seed in range(3):
        groups.seed = seed
        runs.append(groups.resampler(*case))
    for results in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], results, strict=True))
