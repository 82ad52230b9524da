"""Hostfiles, with every way to get one wrong, and hosts that do not answer (a stand-in for ssh; the real one is used
in tests/distributed)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainer.resilience.hosts import Host, HostfileError, read_hostfile, unreachable, write_hostfile


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(HostfileError) as caught:
        read_hostfile(hostfile(folder, text))
    assert caught.value.exit_code == 2
    title, *lines = str(caught.value).splitlines()
    assert str(folder / "hostfile") in title
    return lines


def test_what_is_written_is_read(tmp_path: Path) -> None:
    hosts = (Host("node-b.cluster", 8), Host("10.0.0.1", 8))
    write_hostfile(tmp_path / "hostfile", hosts)
    assert read_hostfile(tmp_path / "hostfile") == hosts


def test_comments_and_empty_lines(tmp_path: Path) -> None:
    text = "# the cluster\n\n  a   slots=2  # rack 1\n#b slots=2\nc\tslots=2\n"
    assert read_hostfile(hostfile(tmp_path, text)) == (Host("a", 2), Host("c", 2))


def test_all_problems_at_once(tmp_path: Path) -> None:
    lines = problems(tmp_path, "a slots=2\nb\n\nc slots=0\nd slots=two\na slots=2\ne slots=4\n")
    assert len(lines) == 5
    for line, expected in zip(lines, ("line 2: 'b'", "line 4: c has no", "line 5: 'd slots=two'"), strict=False):
        assert expected in line
    assert "line 6: a is listed twice, first in line 1" in lines[3]
    assert "unequal slots: a 2 (line 1), e 4 (line 7)" in lines[4]


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a,b", "node[1-4]", "a;b", "a$b", "^file", "a.", "user@a"])
def test_names_that_ssh_or_pdsh_would_read_differently(tmp_path: Path, name: str) -> None:
    assert "is not" in problems(tmp_path, f"{name} slots=1\n")[0]


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "names no host" in problems(tmp_path, "# a slots=1\n")[0]
    with pytest.raises(HostfileError, match="nowhere cannot be read"):
        read_hostfile(tmp_path / "nowhere")


def test_hosts_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """good answers only when the others are being asked; slow never does; bad refuses."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\n"
        f'[ "$1 $2 $5 $6 $7" = "-o BatchMode=yes -F config --" ] || {{ echo "called with $*" >&2; exit 255; }}\n'
        f'case "$8" in\n'
        f"good) for i in $(seq 500); do\n"
        f"    [ -e {tmp_path}/bad ] && [ -e {tmp_path}/slow ] && exit 0; sleep 0.01; done ;;\n"
        f"slow) touch {tmp_path}/slow; exec sleep 60 ;;\n"
        f'bad) touch {tmp_path}/bad; echo "a banner" >&2; echo "no route to it" >&2; exit 255 ;;\n'
        "esac\nexit 1\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    started = time.monotonic()
    hosts = [Host(name, 1) for name in ("good", "slow", "bad")]
    silent = unreachable(hosts, ["-F", "config"], 3)
    assert silent.pop("slow").startswith("no answer within 3 s")
    assert silent == {"bad": "no route to it"}
    assert time.monotonic() - started < 30
