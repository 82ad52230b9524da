"""Runs whose images keep their aspect ratio have the same losses on one and two processes.

Every rank has other image shapes, and all ranks run the same modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.helpers import build_manifest, mmc4, noise, saved, write_shard
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_ledger, run_settings
from tests.distributed.train_in_process import train_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the assets of other runs, and pairs and documents with images of many shapes."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    rng = np.random.default_rng(1)
    pictures = [saved(noise(*rng.integers(6, 60, 2).tolist(), seed=i), "PNG") for i in range(200)]
    captions = [" ".join(rng.choice(["red", "sky", "a"], size=4)) for _ in pictures]
    pairs = [(f"p{i}", {"png": pictures[i], "txt": captions[i].encode()}) for i in range(200)]
    write_shard(folder / "data" / "shapes" / "0.tar", pairs)
    documents = []
    for i in range(40):
        # A fourth of the documents begins with so much text that no image is in the row: the tower gets a dummy image.
        images = {name: pictures[i] for name in mmc4([], [0] * (1 + i % 3)) if name.endswith("png")}
        texts = [*["a and"] * 12, *captions[: 1 + i % 3]] if i % 4 == 0 else captions[: 1 + i % 3]
        documents.append((f"d{i}", {**mmc4(texts, [len(texts) - 1 - n for n in range(1 + i % 3)]), **images}))
    write_shard(folder / "data" / "mixed" / "0.tar", documents)
    for kind in ("shapes", "mixed"):
        build_manifest(folder / "data" / kind)
    return folder


def settings(assets: Path, run_dir: Path) -> dict[str, Any]:
    """Return settings with two sources of any aspect ratio, a source of text and one of square images."""
    found = run_settings(assets, run_dir)
    found["training"]["steps"] = 4
    pairs, documents, _ = found["data"]["sources"]
    pairs.update(manifest=str(assets / "data/shapes/manifest.npz"), image_tokens=6, packing=True)
    documents.update(manifest=str(assets / "data/mixed/manifest.npz"), image_tokens=9)
    squares = {**pairs, "name": "squares", "batch_size": 4, "packing": False}
    del squares["image_tokens"]
    found["data"]["sources"].append(squares)
    return found


def test_one_process_and_two_give_the_same_losses_and_samples(assets: Path, tmp_path: Path) -> None:
    run_distributed(train_run, 1, settings(assets, tmp_path / "one"))
    run_distributed(train_run, 2, settings(assets, tmp_path / "two"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert read_ledger(tmp_path / "one") == read_ledger(tmp_path / "two")
