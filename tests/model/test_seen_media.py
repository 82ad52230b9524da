"""Compare the blocks of keys that each token attends to with a loop over tokens."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from model.config import CrossAttentionConfig
from model.media_index import preceding
from model.seen_media import MediaBlocks, find_seen_media

IMAGE = 7


def seen_by_hand(
    ids: torch.Tensor, documents: torch.Tensor, blocks: list[list[int]], attend: str, groups: bool
) -> list[list[list[int]]]:
    """Return the blocks that each token sees; ``blocks`` are those of each medium."""
    rows, number = [], 0
    for row, of_document in zip(ids.tolist(), documents.tolist(), strict=True):
        places: list[tuple[int, int]] = []  # place and number of each medium
        result = []
        for place, token in enumerate(row):
            if token == IMAGE:
                places.append((place, number))
                number += 1
            own = [(p, medium) for p, medium in places if of_document[p] == of_document[place]]
            if attend == "one" and own:
                first = len(own) - 1
                while groups and first > 0 and own[first - 1][0] == own[first][0] - 1:
                    first -= 1
                own = own[first:]
            result.append([block for _, medium in own for block in blocks[medium]])
        rows.append(result)
    return rows


def expand(last: torch.Tensor, first: torch.Tensor | None) -> list[list[list[int]]]:
    first = last if first is None else first
    return [
        [list(range(low, high + 1)) if high >= 0 else [] for low, high in zip(*pair, strict=True)]
        for pair in zip(first.tolist(), last.tolist(), strict=True)
    ]


@pytest.mark.parametrize("attend", ["one", "all"])
@pytest.mark.parametrize(("groups", "tiles"), list(product([False, True], repeat=2)))
def test_runs_of_media_tiles_and_groups(attend: str, groups: bool, tiles: bool) -> None:
    config = CrossAttentionConfig(attend=attend, media_groups=groups)  # type: ignore[arg-type]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 8, (3, 14), generator=generator)  # a third of the tokens are images
        documents = (torch.rand(3, 14, generator=generator) < 0.2).cumsum(-1)
        number = int((ids == IMAGE).sum())
        counts = torch.randint(1, 5, (number,), generator=generator) if tiles else torch.ones(number, dtype=torch.int64)
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        blocks = [list(range(int(cu[i]), int(cu[i + 1]))) for i in range(number)]
        index = preceding(ids, IMAGE, documents)
        seen = find_seen_media(config, index, ids == IMAGE, documents, MediaBlocks(cu) if tiles else None)
        expected = seen_by_hand(ids, documents, blocks, attend, groups)
        assert expand(seen.last, seen.first) == expected
        assert seen.has_media is None
        assert seen.order is None


def test_a_run_of_one_block_needs_no_first_block() -> None:
    ids = torch.tensor([[IMAGE, 5, IMAGE]])
    seen = find_seen_media(CrossAttentionConfig(), preceding(ids, IMAGE), ids == IMAGE)
    assert seen.first is None


def test_tokens_without_media_are_marked() -> None:
    ids = torch.tensor([[5, IMAGE, 5], [5, 5, 5]])
    config = CrossAttentionConfig(without_media="nothing")
    seen = find_seen_media(config, preceding(ids, IMAGE), ids == IMAGE)
    assert seen.has_media is not None
    assert seen.has_media.tolist() == [[False, True, True], [False] * 3]


def test_the_leak_reaches_all_blocks_of_the_row_and_padding_comes_last() -> None:
    ids = torch.tensor([[5, IMAGE, IMAGE, 5], [IMAGE, 5, IMAGE, 5]])
    config = CrossAttentionConfig(without_media="all_media", media_groups=True)
    # 3 blocks a medium, of which 2, 1, 3 and 1 are real
    blocks = MediaBlocks(torch.arange(5) * 3, torch.tensor([2, 1, 3, 1]))
    seen = find_seen_media(config, preceding(ids, IMAGE), ids == IMAGE, None, blocks)
    assert seen.order is not None
    order = seen.order.tolist()
    assert order == [0, 1, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    runs = expand(seen.last, seen.first)
    real = [[[order[block] for block in run] for run in row] for row in runs]
    assert real[0][0] == order[:6], "everything in the row"
    assert real[0][1:] == [[0, 1], [0, 1, 3], [0, 1, 3]]
    assert real[1] == [[6, 7, 8], [6, 7, 8], [9], [9]]


def test_a_black_medium_is_seen_by_nobody() -> None:
    ids = torch.full((2, 3), 5)
    config = CrossAttentionConfig(without_media="all_media")
    seen = find_seen_media(config, torch.full((2, 3), -1), ids == IMAGE, None, MediaBlocks(torch.tensor([0, 4])))
    assert (seen.last == -1).all()
    assert seen.order is None
