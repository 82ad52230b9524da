"""Check the checks of the emulator: with a barrier or a wait switched off, or a line changed, they must fail."""

from __future__ import annotations

import faulthandler
import functools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from tests.ops import emulator as emulation
from tests.ops.cases import (
    Expected,
    cross_case,
    expect,
    resampler_case,
)
from tests.ops.emulator import COPIES, EmulationError, Emulator, Site
from tests.ops.test_emulator import check

# These inputs make every loop of the kernels run at least four times.
LONG_TEXT = [0] * 70 + [1] * 280 + [-1] * 3 + [3] * 20


@functools.cache
def long_cases() -> list[Expected]:
    options = {"num_heads": 1, "dtype": torch.bfloat16}
    return [
        expect(cross_case(LONG_TEXT, num_media=4, **options)),
        expect(cross_case(LONG_TEXT[:200], num_media=4, num_latents=140, so_far=True, **options)),
        expect(resampler_case([200, 60], num_latents=30, **options)),
        expect(resampler_case([70, 90], num_latents=200, **options)),
        expect(cross_case([0] * 5 + [1] * 5, num_media=2, **options)),  # equally long media
    ]


@functools.cache
def shared_cases() -> list[Expected]:
    options = {"num_media": 2, "num_heads": 4, "num_kv_heads": 2, "dtype": torch.bfloat16}
    return [expect(cross_case([0] * 70 + [1] * 3, so_far=so_far, **options)) for so_far in (False, True)]


def passes(emulator: Emulator, seed: int, copies: str, cases: Callable[[], list[Expected]] = long_cases) -> bool:
    emulator.seed, emulator.copies = seed, copies
    try:
        for expected in cases():
            check(emulator, expected)
    except (AssertionError, EmulationError):
        return False
    return True


def is_caught(emulator: Emulator, seeds: int, cases: Callable[[], list[Expected]] = long_cases) -> bool:
    """Return whether some run fails or crashes, in another process, since a wrong kernel may write anywhere."""
    cases()  # computed here, because a forked process should not start torch's threads
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a crash is expected
        torch.set_num_threads(1)
        every_run_passes = all(passes(emulator, seed, copies, cases) for seed in range(seeds) for copies in COPIES)
        os._exit(0 if every_run_passes else 1)
    return os.waitpid(child, 0)[1] != 0


def not_needed(
    emulator: Emulator, sites: Iterable[Site], cases: Callable[[], list[Expected]] = long_cases
) -> list[Site]:
    """Return the sites without which every run passes, each switched off by itself."""

    def is_needed(site: Site) -> bool:
        emulator.skipped_site = site.number
        return is_caught(emulator, seeds=3, cases=cases)

    try:
        return [site for site in sites if not is_needed(site)]
    finally:
        emulator.skipped_site = -1


@pytest.fixture(scope="module")
def small_emulator(tmp_path_factory: pytest.TempPathFactory, emulator: Emulator) -> Emulator:
    """Build bfloat16 of head_dim 64 alone, so that its list of sites is complete after one run."""
    built = emulation.build(Path(tmp_path_factory.mktemp("head_dim_64")), only=64)
    assert all(passes(built, seed, copies) for seed in range(2) for copies in COPIES)
    return built


@pytest.mark.slow
def test_every_barrier_and_every_wait_is_needed(small_emulator: Emulator) -> None:
    sites = small_emulator.sites()
    assert {site.kind for site in sites} == {"barrier", "wait"}
    assert len(sites) >= 7
    assert not_needed(small_emulator, sites) == []


MUTANTS = {
    "one key too many": ("attention_forward.cuh", "+ (i & 1) < valid_keys", "+ (i & 1) <= valid_keys"),
    "sum not rescaled": ("attention_forward.cuh", "state.sum_first *= rescale_first;", ""),
    "next block into the stage in use": ("attention_forward.cuh", "(stage ^ 1)", "stage"),
    "last medium not visited": ("problem.cuh", "max(0, largest_lane(max(end[2], end[3])) - medium)", "1"),
    "unseen media seen": ("problem.cuh", "medium < seen_by_first.end;", "true;"),
    "a medium ends early": ("problem.cuh", "first + kTile < p.latents;", "false;"),
    "a medium starts at its second block": ("problem.cuh", "same_medium ? first + kTile : 0;", "first + kTile;"),
    "features after the last one": ("problem.cuh", "feature < end ? end - feature :", "false ? 0 :"),
    "latents of the next medium": ("problem.cuh", "row + feature - after", "row + feature - end"),
    "last medium not seen": ("problem.cuh", "(last + 1) * blocks_of_medium(p)", "last * blocks_of_medium(p)"),
    "last row of a medium lost": ("masked_cross_attention.cuh", "medium, row + 1)", "medium, row)"),
    "blind rows not cleared": ("masked_cross_attention.cuh", ">= 0) continue;", ">= -1) continue;"),
    "latents of the wrong medium": ("problem.cuh", "(medium) * p.latents + in_medium", "(medium + 1) * p.latents"),
    "features beyond the medium": ("problem.cuh", "min(kTile, features.end - static_cast<int>(first))", "kTile"),
    "slot of the wrong medium": ("problem.cuh", "kTile + middle <= slot", "kTile + middle < slot"),
    "rows of a fragment shifted": ("tile.cuh", "fragment_row() + half * 8)", "fragment_row() + half * 7)"),
    "wrong rows of a matrix": ("tile.cuh", "n * 16 + (lane & 7) + ((lane >> 4) << 3)", "n * 16 + (lane & 7)"),
    "no mean in the gradient": ("attention_backward.cuh", "s[n][i] * (dp[n][i] - delta);", "s[n][i] * dp[n][i];"),
    "two media in one place": ("masked_cross_attention.cuh", "other < medium);", "false);"),
    "values' gradient scaled": ("attention_backward.cuh", "dv, factor, factor,", "dv, scaled, scaled,"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_kernel_is_caught(name: str, small_emulator: Emulator, tmp_path: Path) -> None:
    assert is_caught(build_mutant(tmp_path, *MUTANTS[name]), seeds=1)


def build_mutant(
    folder: Path, file: str, original: str, replacement: str, head_dim: int = 64, *, warpgroups: bool = False
) -> Emulator:
    shutil.copytree(emulation.CSRC, folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    text = source.read_text()
    assert original in text, "the mutant no longer fits the source"
    source.write_text(text.replace(original, replacement))
    return emulation.build(folder, folder / "csrc", only=head_dim, warpgroups=warpgroups)


@functools.cache
def wide_cases() -> list[Expected]:
    """Return cases of head_dim 128, where keys and values use three tiles in turns."""
    options = {"num_heads": 1, "head_dim": 128, "dtype": torch.bfloat16}
    text = cross_case(LONG_TEXT[:100], num_media=4, num_latents=140, so_far=True, **options)
    return [expect(text), expect(resampler_case([200, 60], num_latents=30, **options))]


MUTANTS_OF_TURNS = {
    "values in the place of the next keys": ("attention_forward.cuh", "copy_v(k);", "copy_v(unused);"),
    "keys over the values in use": ("attention_forward.cuh", "copy_k(unused);", "copy_k(v);"),
    "tiles not exchanged": ("attention_forward.cuh", "unused = read;", "unused = k;"),
    "a barrier that not all warps reach": ("attention_forward.cuh", "copy_k(unused);", "if (!part) continue;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS_OF_TURNS)
def test_a_changed_kernel_with_turns_is_caught(name: str, tmp_path: Path) -> None:
    assert is_caught(build_mutant(tmp_path, *MUTANTS_OF_TURNS[name], 128), seeds=1, cases=wide_cases)


@pytest.mark.slow
def test_every_barrier_and_every_wait_of_turns_is_needed(tmp_path: Path) -> None:
    wide = emulation.build(tmp_path, only=128)
    assert not is_caught(wide, seeds=1, cases=wide_cases)
    assert all(passes(wide, 0, copies, wide_cases) for copies in COPIES)
    sites = [site for site in wide.sites() if site.file == "attention_forward.cuh"]
    assert len(sites) == 4
    assert not_needed(wide, sites, wide_cases) == []


@functools.cache
def group_cases() -> list[Expected]:
    """Return cases of head_dim 64 for all kernels, with several visits of each loop and rows that see some keys."""
    options = {"num_heads": 1, "dtype": torch.bfloat16}
    text = [cross_case(LONG_TEXT[60:300], num_media=4, **options)]
    text += [cross_case(LONG_TEXT[:130], num_media=4, num_latents=140, so_far=True, **options)]
    media = [resampler_case([200, 60], num_latents=30, **options), resampler_case([70], num_latents=200, **options)]
    return [expect(case) for case in (*text, *media)]


@functools.cache
def wide_group_cases() -> list[Expected]:
    options = {"num_heads": 1, "head_dim": 128, "dtype": torch.bfloat16}
    return [*wide_cases(), expect(cross_case(LONG_TEXT[60:300], num_media=4, **options))]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_instruction_that_orders_warpgroups_is_needed(
    group_emulators: dict[int, Emulator], head_dim: int
) -> None:
    groups, cases = group_emulators[head_dim], group_cases if head_dim == 64 else wide_group_cases
    assert all(passes(groups, 0, copies, cases) for copies in COPIES)
    sites = groups.sites()
    assert {site.kind.partition(" ")[0] for site in sites} == {"start", "commit", "wait", "publication", "barrier"}
    assert len(sites) >= 29
    assert not_needed(groups, sites, cases) == []


MUTANTS_OF_WARPGROUPS = {
    "eight rows too close": ("warpgroup.cuh", "kEightRows = 64", "kEightRows = 56"),
    "panels too close": ("warpgroup.cuh", "kPanelUnits = kPanel / 8", "kPanelUnits = kPanel / 16"),
    "the second panel not used": ("warpgroup.cuh", "k / 4 * (kPanel / 8) + k % 4 * 2", "k % 4 * 2"),
    "the same columns again": ("warpgroup.cuh", "k % 4 * 2;", "0;"),
    "the same values again": ("warpgroup.cuh", "left[k], right + k * kSixteenRows", "left[k], right"),
    "the same weights again": ("warpgroup.cuh", "left + k * kSixteenRows,", "left,"),
    "gradients of keys and values exchanged": (
        "attention_backward.cuh",
        "(s, v, a, t, w, b);\n  } else",
        "(t, v, a, s, w, b);\n  } else",
    ),
    "columns of the first panel in the second": ("warpgroup.cuh", "matrix + 64", "matrix"),
    "scores on top of the last ones": ("warpgroup.cuh", "  clear(s);\n", ""),
    "a second product not committed": (
        "warpgroup.cuh",
        "  issue_keys<kType, kWidth>(t, w, b);\n  commit_products();",
        "  commit_products();\n  start_products();\n  issue_keys<kType, kWidth>(t, w, b);",
    ),
    "published before the copies arrive": (
        "attention_forward.cuh",
        "wait_copies<1>();\n    publish_writes();",
        "publish_writes();\n    wait_copies<1>();",
    ),
    "a warp stays away": ("attention_forward.cuh", "return kWarpgroups || any_lane", "return any_lane"),
    "rows as mma.sync reads them": ("attention_forward.cuh", "copy_panels<kWidth>(", "copy_tile<kWidth>("),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS_OF_WARPGROUPS)
def test_a_changed_kernel_of_warpgroups_is_caught(name: str, tmp_path: Path) -> None:
    mutant = build_mutant(tmp_path, *MUTANTS_OF_WARPGROUPS[name], 128, warpgroups=True)
    assert is_caught(mutant, seeds=1, cases=wide_cases)


@functools.cache
def split_cases() -> list[Expected]:
    options = {"num_heads": 2, "dtype": torch.bfloat16}
    media = [expect(resampler_case(lengths, num_latents=n, **options)) for n, lengths in ((64, [200, 0]), (70, [90]))]
    text = [cross_case([0] * 300 + [2], num_media=3, num_latents=n, num_kv_heads=1, **options) for n in (64, 140)]
    return [*media, *map(expect, text)]


MUTANTS_OF_SPLITS = {
    "a block of keys left out": ("problem.cuh", "begin + each + (split < more)", "begin + each"),
    "a block of keys twice": ("problem.cuh", "split * each + min(split, more)", "split * each"),
    "parts in one place": ("attention_forward.cuh", "static_cast<int64_t>(block_z()) * p.rows", "0"),
    "weights not added up": ("resampler_attention.cuh", "weights += weight;", "weights += 1.0f;"),
    "a part left out": ("resampler_attention.cuh", "int first = 0; first", "int first = 1; first"),
    "first parts not rescaled": ("resampler_attention.cuh", "sum[i] *= rescale;", "sum[i] *= 1.0f;"),
    "gradient of q without a part": ("tile.cuh", "int first = 0; first < splits", "int first = 1; first < splits"),
    "gradients of v as those of k": ("attention_backward.cuh", "(parts + size, key_stride", "(parts, key_stride"),
    "a part without rows not written": (
        "masked_cross_attention.cuh",
        "  backward_of_block<",
        "  if (range.begin >= range.end) return;\n  backward_of_block<",
    ),
    "gradient of v not cleared": ("attention_backward.cuh", "clear(dv);", "if (range.begin == 0) clear(dv);"),
    "rows of the first tile": ("problem.cuh", "{all.begin + tiles.begin * kTile,", "{all.begin,"),
    "rows of the next part": ("problem.cuh", "min(all.end, all.begin + tiles.end * kTile)", "all.end"),
    "parts of the wrong place": ("attention_backward.cuh", "2 * block_z() * size", "block_z() * size"),
    "parts of q in one place": ("attention_backward.cuh", "static_cast<int64_t>(block_z()) * p.rows", "0"),
    "a part of the gate's gradient lost": ("attention_backward.cuh", "(block) * p.splits + block_z()", "(block)"),
    "gradients of k as those of v": ("masked_cross_attention.cuh", "block_y() * size + at", "at"),
    "lse of the largest part": ("resampler_attention.cuh", "maximum + natural_log(weights);", "maximum;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS_OF_SPLITS)
def test_a_changed_kernel_with_splits_is_caught(name: str, tmp_path: Path) -> None:
    mutant = build_mutant(tmp_path, *MUTANTS_OF_SPLITS[name])
    mutant.splits = 5
    assert is_caught(mutant, seeds=1, cases=split_cases)


@pytest.mark.slow
def test_every_barrier_and_every_wait_of_splits_is_needed(small_emulator: Emulator) -> None:
    small_emulator.splits = 2
    try:
        assert not is_caught(small_emulator, seeds=1, cases=split_cases)
        sites = [site for site in small_emulator.sites() if site.file.startswith("attention_")]
        assert not_needed(small_emulator, sites, split_cases) == []
    finally:
        small_emulator.splits = 1


MUTANTS_OF_SHARED_HEADS = {
    "keys of the wrong head": ("problem.cuh", "return head / p.shared_by;", "return head % p.key_heads;"),
    "the next head is the same one": ("attention_backward.cuh", "{range.begin, head + 1}", "{range.begin, head}"),
    "the first head is another one": ("attention_backward.cuh", "key_head * Problem::shared_by(p)}", "key_head}"),
    "one head left out": ("attention_backward.cuh", "kTile * Problem::shared_by(p) : 0;", "kTile : 0;"),
    "gradients as far apart as queries": (
        "attention_backward.cuh",
        "(Problem::key_heads(p)) * kWidth",
        "(p.heads) * kWidth",
    ),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", MUTANTS_OF_SHARED_HEADS)
def test_a_changed_kernel_of_shared_heads_is_caught(name: str, tmp_path: Path) -> None:
    assert is_caught(build_mutant(tmp_path, *MUTANTS_OF_SHARED_HEADS[name]), seeds=1, cases=shared_cases)
