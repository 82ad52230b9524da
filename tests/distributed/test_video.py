"""Videos through a whole run: two processes, ZeRO-3, beside images, whose media have another number of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.helpers import build_manifest, write_shard
from tests.data.videos import video_bytes
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import WORDS, losses, make_assets, read_ledger, read_metrics, run_settings
from tests.distributed.test_training import train_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in the other runs, and ``data/videos``, a few of which are cut."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    rng = np.random.default_rng(0)
    for shard in range(2):
        samples = []
        for number in range(12):
            color = tuple(int(level) for level in rng.integers(0, 256, 3))
            video = video_bytes(3, rate=5, size=(24, 16), color=lambda _, color=color: color)  # type: ignore[misc]
            caption = " ".join(rng.choice(WORDS, size=3))
            samples.append((f"v{number}", {"mp4": video[:-100] if number == 5 else video, "txt": caption.encode()}))
        write_shard(folder / "data/videos" / f"{shard}.tar", samples)
    build_manifest(folder / "data/videos")
    return folder


def video_run(assets: Path, run_dir: Path) -> dict[str, Any]:
    settings = run_settings(assets, run_dir)
    manifest = str(assets / "data/videos/manifest.npz")
    videos = {"name": "videos", "type": "video_text", "manifest": manifest, "batch_size": 4, "max_tokens": 24}
    videos |= {"num_frames": 4, "frames_per_second": 2.0, "augment": {"horizontal_flip": 0.5, "hue": 0.1}}
    settings["data"]["sources"] = [settings["data"]["sources"][0], videos]
    settings["model"]["resampler"]["frames"] = 2  # fewer than the videos have: interpolated
    return settings


def test_one_process_and_two_give_the_same_and_so_does_a_resumed_run(assets: Path, tmp_path: Path) -> None:
    run_distributed(train_run, 2, video_run(assets, tmp_path / "two"))
    run_distributed(train_run, 1, video_run(assets, tmp_path / "one"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    run_distributed(train_run, 2, video_run(assets, tmp_path / "resumed"), 3)
    run_distributed(train_run, 2, video_run(assets, tmp_path / "resumed"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "two"), "bit for bit"
    ledgers = [read_ledger(tmp_path / name) for name in ("one", "two", "resumed")]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    lines = read_metrics(tmp_path / "two")
    assert {line["samples/videos"] for line in lines} == {4}
    assert sum(line["replaced_samples"] for line in lines) > 0  # the cut ones
    assert not [sample for sample in ledgers[0] if sample[1] == "videos" and sample[3] == 5]
    assert lines[-1]["loss/videos"] < lines[0]["loss/videos"]
