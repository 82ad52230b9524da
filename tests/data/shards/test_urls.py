"""Test which urls name a local path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.data.shards.urls import is_remote, local_path, path_url


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("a/b.tar", "/base/a/b.tar"),
        ("/a/b.tar", "/a/b.tar"),
        ("file:///a/b.tar", "/a/b.tar"),
        ("file://localhost/a/b.tar", "/a/b.tar"),
        ("file:a.tar", "/base/a.tar"),
    ],
)
def test_local_urls(url: str, path: str) -> None:
    assert local_path(url, Path("/base")) == Path(path)


@pytest.mark.parametrize("url", ["http://x/a.tar", "s3://x/a.tar", "gs://x/a", "PIPE:ls", "x+y:z"])
def test_other_schemes_are_not_local(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        local_path(url)


@pytest.mark.parametrize("path", ["export-2026-01-02T10:00:00.tar", "run:1/0.tar", "s3:a.tar", "/a:b.tar", "a.tar"])
def test_paths_with_colons_are_paths(path: str) -> None:
    url = path_url(path)
    assert not is_remote(url)
    assert local_path(url) == Path(path)


def test_a_name_that_reads_as_a_scheme_has_a_cure() -> None:
    with pytest.raises(ValueError, match="./PATH"):
        is_remote("run:1/0.tar")
