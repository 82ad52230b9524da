"""Compare the medium that a token sees with a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from model.media_index import documents_from_positions, find_documents, first_media, following, preceding

IMAGE = 7


def by_hand(ids: torch.Tensor, documents: torch.Tensor, mode: str) -> list[list[int]]:
    rows, offset = [], 0
    for row, numbers in zip(ids.tolist(), documents.tolist(), strict=True):
        places = [place for place, token in enumerate(row) if token == IMAGE]
        index = []
        for place in range(len(row)):
            own = [k for k, p in enumerate(places) if numbers[p] == numbers[place]]
            before, after = [k for k in own if places[k] <= place], [k for k in own if places[k] > place]
            seen = before[-1:] if mode == "preceding" else after[:1] if mode == "following" else own[:1]
            if mode == "first" and not before:
                seen = []
            index.append(seen[0] + offset if seen else -1)
        rows.append(index)
        offset += len(places)
    return rows


def random_documents(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.where(torch.rand(4, 23, generator=generator) < 0.25, IMAGE, 1)
    documents = (torch.rand(4, 23, generator=generator) < 0.2).cumsum(-1)
    return ids, documents


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("packed", [False, True])
def test_the_index_equals_a_loop(seed: int, packed: bool) -> None:
    ids, documents = random_documents(seed)
    given = documents if packed else None
    documents = documents if packed else torch.zeros_like(ids)
    assert preceding(ids, IMAGE, given).tolist() == by_hand(ids, documents, "preceding")
    assert following(ids, IMAGE, given).tolist() == by_hand(ids, documents, "following")
    assert first_media(preceding(ids, IMAGE, given), given).tolist() == by_hand(ids, documents, "first")


def test_a_document_of_the_paper() -> None:
    #                     <BOS> <image> a  b  <EOC> <image> c
    ids = torch.tensor([1, IMAGE, 2, 3, 4, IMAGE, 5])
    assert preceding(ids, IMAGE).tolist() == [-1, 0, 0, 0, 0, 1, 1]
    assert following(ids, IMAGE).tolist() == [0, 1, 1, 1, 1, -1, -1]
    assert first_media(preceding(ids, IMAGE)).tolist() == [-1, 0, 0, 0, 0, 0, 0]


def test_rows_of_a_batch_share_one_list_of_media() -> None:
    ids = torch.tensor([[IMAGE, 1, IMAGE], [1, 1, 1], [1, IMAGE, 1]])
    assert preceding(ids, IMAGE).tolist() == [[0, 0, 1], [-1, -1, -1], [-1, 2, 2]]
    assert following(ids, IMAGE).tolist() == [[1, 1, -1], [-1, -1, -1], [2, -1, -1]]


def test_document_numbers_may_repeat_after_another_document() -> None:
    ids = torch.tensor([IMAGE, 1, 1, 1])
    documents = torch.tensor([0, 0, 1, 0])
    assert preceding(ids, IMAGE, documents).tolist() == [0, 0, -1, -1]
    assert first_media(torch.tensor([0, 0, 1, 2]), documents).tolist() == [0, 0, 1, 2]


def test_documents_are_found_by_their_positions() -> None:
    assert documents_from_positions(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist() == [[1, 1, 1, 2, 2, 3]]


def test_text_without_media_sees_none() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    assert (preceding(ids, IMAGE) == -1).all()
    assert (following(ids, IMAGE) == -1).all()
    assert (first_media(preceding(ids, IMAGE)) == -1).all()


def test_offsets_of_documents_count_over_all_rows() -> None:
    offsets, longest = find_documents(torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]]))
    assert (offsets.tolist(), offsets.dtype, longest) == ([0, 3, 4, 5, 8], torch.int32, 3)
