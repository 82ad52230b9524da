"""Imported models compute what transformers' own classes compute: logits, gradients, beams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.flamingo import Flamingo
from model.generation import generate
from model.imports.convert import FAMILIES, Choices, WithoutMedia, import_transformers
from model.media_inputs import to_patches
from model.pretrained import from_pretrained
from tests.model.builders import EOS
from tests.model.imports.sources import (
    FAKE_ID,
    IMAGE_ID,
    MLLAMA_IMAGE_ID,
    SIZE,
    random_pixels,
    tiny_idefics,
    tiny_mllama,
    write_source,
)

TOLERANCE = 1e-5
IDEFICS_VARIANTS: dict[str, dict[str, Any]] = {
    "9b": {},  # the published ones have vectors and norms of queries and keys
    "scalar gates, no head norms": {
        "alpha_type": "float",
        "alpha_initializer": "ones",
        "qk_layer_norms": False,
        "cross_layer_interval": 1,
    },
    "tied tables": {"tie_word_embeddings": True},
}


@dataclass
class Pair:
    """A model of transformers, what was imported from it, and the same batch for both.

    Attributes:
        theirs: Model of transformers.
        ours: Imported model.
        family: Name of the family.
        their_inputs: Inputs of ``theirs``.
        our_inputs: Inputs of ``ours``.
    """

    theirs: Any
    ours: Flamingo
    family: str
    their_inputs: dict[str, Tensor]
    our_inputs: dict[str, Any]

    def layout(self) -> Any:
        tokens = self.ours.tokens
        return FAMILIES[self.family].layout(self.theirs.config, tokens.image_id, tokens.end_of_chunk_id)


def idefics_pair(folder: Path, **changes: Any) -> Pair:
    theirs = tiny_idefics(**changes)
    import_transformers(write_source(theirs, folder / "source"), folder / "export", Choices())
    ours = from_pretrained(folder / "export")
    ids = torch.randint(4, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(2, 12, 2)
    for row, places in enumerate(([2, 6], [0, 8])):
        ids[row, places] = IMAGE_ID
        ids[row, places[1] - 1] = FAKE_ID
        seen[row, places[0] : places[1], 0] = seen[row, places[1] :, 1] = 1
    media = random_pixels(4, 1, 3, SIZE, SIZE)
    pixels = ours.vision_encoder.normalize(media[:, 0]).unflatten(0, (2, 2))
    their_inputs = {"input_ids": ids, "pixel_values": pixels, "image_attention_mask": seen}
    return Pair(theirs, ours, "idefics", their_inputs, {"input_ids": ids, "media": media})


def mllama_pair(folder: Path, mode: WithoutMedia, *, first: int = 0, grids: tuple[tuple[int, int], ...] = ()) -> Pair:
    """Return a Llama 3.2 Vision; rows have an image at ``first`` and a group of two, or two single images."""
    theirs = tiny_mllama()
    source = folder / "source"
    if not source.exists():
        write_source(theirs, source)
    import_transformers(source, folder / mode, Choices(without_media=mode))
    ours = from_pretrained(folder / mode)
    ids = torch.randint(4, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    grids = grids or ((1, 1),) * 4
    seen = torch.zeros(2, 12, 2, 4)
    starts = ((first, first + 1), (first, 8))
    for row, (one, two) in enumerate(starts):
        ids[row, [one, two]] = MLLAMA_IMAGE_ID
        tiles = [rows * columns for rows, columns in grids[2 * row : 2 * row + 2]]
        seen[row, one : 12 if two == one + 1 else two, 0, : tiles[0]] = 1
        seen[row, two:, 1, : tiles[1]] = 1
    pixels = torch.zeros(2, 2, 4, 3, SIZE, SIZE)
    mask, shapes = torch.zeros(2, 2, 4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    known = [tuple(pair) for pair in theirs.config.vision_config.supported_aspect_ratios]
    patches = []
    for number, (rows, columns) in enumerate(grids):
        place = divmod(number, 2)
        tiles = to_patches(random_pixels(1, 3, rows * SIZE, columns * SIZE, seed=number), SIZE)
        patches.append(tiles)
        pixels[place][: len(tiles)] = ours.vision_encoder.normalize(tiles)
        mask[place][: len(tiles)] = 1
        shapes[place] = known.index((rows, columns)) + 1
    their_inputs = {
        "input_ids": ids,
        "pixel_values": pixels,
        "aspect_ratio_ids": shapes,
        "aspect_ratio_mask": mask,
        "cross_attention_mask": seen,
    }
    our_inputs: dict[str, Any] = {"input_ids": ids, "media": torch.cat(patches)}
    if set(grids) == {(1, 1)}:
        our_inputs["media"] = our_inputs["media"][:, None]
    else:
        our_inputs["media_grids"] = [(1, rows, columns) for rows, columns in grids]
    return Pair(theirs, ours, "mllama", their_inputs, our_inputs)


TILES = ((2, 2), (1, 2), (1, 1), (3, 1))
PAIRS = [*IDEFICS_VARIANTS, "mllama, exact", "mllama, exact, tiles", "mllama, from the first token", "mllama, tiles"]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder, name = tmp_path_factory.mktemp("pair"), request.param
    if name in IDEFICS_VARIANTS:
        yield idefics_pair(folder, **IDEFICS_VARIANTS[name])
    elif "exact" in name:
        yield mllama_pair(folder, "all_media", first=2, grids=TILES if "tiles" in name else ())
    else:
        yield mllama_pair(folder, "nothing", grids=TILES if "tiles" in name else ())


def test_logits(pair: Pair) -> None:
    with torch.no_grad():
        theirs = pair.theirs(**pair.their_inputs).logits
        ours = pair.ours(**pair.our_inputs).logits
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_gradients(pair: Pair) -> None:
    """All tensors that train get the same gradient; those of the rows of added tokens too."""
    pair.theirs.zero_grad()
    pair.ours.zero_grad()
    theirs = pair.theirs(**pair.their_inputs).logits
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2)) / theirs.numel()
    (theirs * weights).sum().backward()
    (pair.ours(**pair.our_inputs).logits * weights).sum().backward()
    parameters, own = dict(pair.theirs.named_parameters()), dict(pair.ours.named_parameters())
    layout = pair.layout()
    for entry in layout.trained:
        expected = entry.join(lambda name: parameters[name].grad)
        assert expected.any(), entry.ours
        torch.testing.assert_close(own[entry.ours].grad, expected, rtol=1e-4, atol=TOLERANCE, msg=entry.ours)
    if pair.theirs.config.get_text_config().tie_word_embeddings:
        return  # one table there gets the gradients of two rows here
    for row in layout.rows:
        if pair.family == "idefics" or ("input" in row.ours and row.number == MLLAMA_IMAGE_ID):
            expected = parameters[row.table].grad[row.number][None]
            torch.testing.assert_close(own[row.ours].grad, expected, rtol=1e-4, atol=TOLERANCE, msg=row.ours)


def test_beams(pair: Pair) -> None:
    length = pair.their_inputs["input_ids"].shape[1]
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    image = pair.ours.tokens.image_id
    found = pair.theirs.generate(
        **pair.their_inputs,
        **settings,
        attention_mask=torch.ones(2, length, dtype=torch.int64),
        suppress_tokens=[image],
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    theirs = [[int(token) for token in row[length:] if token != EOS] for row in found]
    prompts = pair.our_inputs["input_ids"].tolist()
    grids = pair.our_inputs.get("media_grids")
    ours = generate(pair.ours, prompts, pair.our_inputs["media"], [2, 2], media_grids=grids, stop_ids=[EOS], **settings)
    assert ours == theirs
    assert len({token for row in ours for token in row}) > 2


def test_the_leak_of_transformers(tmp_path: Path) -> None:
    """Text before an image depends on that image in transformers, and with all_media; the default corrects it."""
    changed = {}
    for mode in ("all_media", "nothing"):
        pair = mllama_pair(tmp_path, mode, first=3)
        other = dict(pair.our_inputs, media=255 - pair.our_inputs["media"])
        with torch.no_grad():
            difference = pair.ours(**pair.our_inputs).logits - pair.ours(**other).logits
        changed[mode] = float(difference[:, :3].abs().max())
        assert difference[:, 3:].abs().max() > 0.1
    with torch.no_grad():
        theirs = pair.theirs(**pair.their_inputs).logits
        pixels = pair.their_inputs["pixel_values"]
        black = pair.theirs(**pair.their_inputs | {"pixel_values": torch.zeros_like(pixels)}).logits
    assert (theirs - black)[:, :3].abs().max() > 1e-3
    assert changed["all_media"] > 1e-3
    assert changed["nothing"] == 0.0


def test_text_before_an_image_is_the_bare_language_models(tmp_path: Path) -> None:
    pair = mllama_pair(tmp_path, "nothing", first=3)
    with torch.no_grad():
        seen = pair.ours(**pair.our_inputs).logits[:, :3]
        bare = pair.theirs(input_ids=pair.our_inputs["input_ids"][:, :3]).logits
    torch.testing.assert_close(seen, bare, rtol=TOLERANCE, atol=TOLERANCE)
