"""Test how hosts are tried over ssh, with a script in place of ssh; tests/distributed uses the real one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainer.resilience.hostfile import Host
from trainer.resilience.ssh import unreachable_hosts


@pytest.mark.slow
def test_all_hosts_are_tried_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Try host "good", which answers only while the others are tried; "slow" never answers, "bad" refuses."""
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
    unreachable = unreachable_hosts(hosts, ["-F", "config"], 3)
    assert unreachable.pop("slow").startswith("no answer within 3 s")
    assert unreachable == {"bad": "no route to it"}
    assert time.monotonic() - started < 30
