"""Runs that mix videos with images have the same losses on one and two processes and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.helpers import build_manifest
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_ledger, read_metrics, run_settings, write_videos
from tests.distributed.train_in_process import train_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the assets of other runs, and ``data/videos``, of which a few are truncated."""
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    write_videos(folder / "data/videos")
    build_manifest(folder / "data/videos")
    return folder


def video_run(assets: Path, run_dir: Path) -> dict[str, Any]:
    """Return settings of pairs and videos."""
    settings = run_settings(assets, run_dir)
    manifest = str(assets / "data/videos/manifest.npz")
    videos = {"name": "videos", "type": "video_text", "manifest": manifest, "batch_size": 4, "max_tokens": 24}
    videos |= {"num_frames": 4, "frames_per_second": 2.0, "augment": {"horizontal_flip": 0.5, "hue": 0.1}}
    settings["data"]["sources"] = [settings["data"]["sources"][0], videos]
    settings["model"]["resampler"]["num_frames"] = (
        2  # the videos have more, so the temporal embeddings are interpolated
    )
    return settings


def test_one_process_two_processes_and_a_resumed_run_are_the_same(assets: Path, tmp_path: Path) -> None:
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
    assert sum(line["replaced_samples"] for line in lines) > 0, "truncated videos must be replaced"
    assert not [sample for sample in ledgers[0] if sample[1] == "videos" and sample[3] == 5]
    assert lines[-1]["loss/videos"] < lines[0]["loss/videos"]
