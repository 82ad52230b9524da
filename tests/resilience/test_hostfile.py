"""Test hostfiles, and every mistake that they can contain."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.resilience.hostfile import Host, HostfileError, read_hostfile, write_hostfile


def hostfile(folder: Path, text: str) -> Path:
    """Write a hostfile."""
    path = folder / "hostfile"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    """Return the problems of a wrong hostfile, one a line."""
    with pytest.raises(HostfileError) as caught:
        read_hostfile(hostfile(folder, text))
    assert caught.value.exit_code == 2
    title, *lines = str(caught.value).splitlines()
    assert str(folder / "hostfile") in title
    return lines


def test_a_written_hostfile_reads_back(tmp_path: Path) -> None:
    hosts = (Host("node-b.cluster", 8), Host("10.0.0.1", 8))
    write_hostfile(tmp_path / "hostfile", hosts)
    assert read_hostfile(tmp_path / "hostfile") == hosts


def test_comments_and_empty_lines_are_ignored(tmp_path: Path) -> None:
    text = "# the cluster\n\n  a   slots=2  # rack 1\n#b slots=2\nc\tslots=2\n"
    assert read_hostfile(hostfile(tmp_path, text)) == (Host("a", 2), Host("c", 2))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    lines = problems(tmp_path, "a slots=2\nb\n\nc slots=0\nd slots=two\na slots=2\ne slots=4\n")
    assert len(lines) == 5
    for line, expected in zip(lines, ("line 2: 'b'", "line 4: c has no", "line 5: 'd slots=two'"), strict=False):
        assert expected in line
    assert "line 6: a is listed twice, first in line 1" in lines[3]
    assert "unequal slots: a 2 (line 1), e 4 (line 7)" in lines[4]


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a,b", "node[1-4]", "a;b", "a$b", "^file", "a.", "user@a"])
def test_names_with_a_meaning_for_ssh_or_pdsh_are_refused(tmp_path: Path, name: str) -> None:
    assert "is not" in problems(tmp_path, f"{name} slots=1\n")[0]


def test_an_empty_or_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    assert "names no host" in problems(tmp_path, "# a slots=1\n")[0]
    with pytest.raises(HostfileError, match="nowhere cannot be read"):
        read_hostfile(tmp_path / "nowhere")
