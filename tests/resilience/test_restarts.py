"""Test when a failed job is started again, and on which nodes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from trainer.resilience.events import EventLog
from trainer.resilience.hostfile import Host
from trainer.resilience.restarts import (
    Failure,
    RestartPolicy,
    cause_on_another_rank,
    choose_hosts,
    read_events,
    read_failure,
)
from trainer.runtime.run_folder import RunFolder

HOSTS = (Host("a", 2), Host("b", 2), Host("c", 2))


def failure(step: int, *errors: tuple[str, str]) -> Failure:
    """Describe a failure after a step, with (host, message) of each failed process."""
    return Failure(step, frozenset(errors))


def test_the_same_error_twice_at_the_same_step_ends_the_run() -> None:
    policy = RestartPolicy(10, 600)
    assert policy.reason_to_stop(failure(7, ("a", "KeyError: x")), now=0) is None
    reason = policy.reason_to_stop(failure(7, ("b", "KeyError: x")), now=1)
    assert reason is not None and "after step 7" in reason and "KeyError: x" in reason


@pytest.mark.parametrize("second", [failure(8, ("a", "KeyError: x")), failure(7, ("a", "OSError: y")), failure(7)])
def test_another_error_or_another_step_restarts_the_run(second: Failure) -> None:
    policy = RestartPolicy(10, 600)
    assert policy.reason_to_stop(failure(7, ("a", "KeyError: x")), now=0) is None
    assert policy.reason_to_stop(second, now=1) is None


def test_too_many_recent_restarts_end_the_run() -> None:
    policy = RestartPolicy(2, 100)
    assert [policy.reason_to_stop(failure(step), now) for step, now in ((1, 0), (2, 60), (3, 130))] == [None] * 3
    reason = policy.reason_to_stop(failure(4), now=140)
    assert reason is not None and "--restarts" in reason


def test_a_host_that_fails_alone_twice_is_suspect() -> None:
    policy = RestartPolicy(10, 600)
    policy.reason_to_stop(failure(3, ("b", "RuntimeError: ECC")), now=0)
    policy.reason_to_stop(failure(4, ("a", "ValueError: z"), ("b", "ValueError: z")), now=1)
    assert policy.suspects == frozenset()
    policy.reason_to_stop(failure(5, ("b", "RuntimeError: ECC")), now=2)
    assert policy.suspects == {"b"}
    assert [host.name for host in choose_hosts(HOSTS, (), policy.suspects, [2, 4, 6])] == ["a", "c"]
    assert choose_hosts(HOSTS[1:2], (), policy.suspects, [2]) == (Host("b", 2),), "a suspect is better than no host"


@pytest.mark.parametrize(
    ("unreachable", "allowed", "expected"),
    [
        ((), [1, 2, 3, 6], [("a", 2), ("b", 2), ("c", 2)]),
        (("b",), [1, 2, 4], [("a", 2), ("c", 2)]),
        ((), [1, 2, 4, 8], [("a", 2), ("b", 2)]),
        (("a",), [1, 3], [("b", 1)]),
        ((), [3], [("a", 1), ("b", 1), ("c", 1)]),
        (("a", "b"), [4], []),
    ],
)
def test_hosts_form_the_largest_world_that_the_batches_allow(
    unreachable: tuple[str, ...], allowed: list[int], expected: list[tuple[str, int]]
) -> None:
    assert [(host.name, host.slots) for host in choose_hosts(HOSTS, unreachable, (), allowed)] == expected


def test_messages_about_a_lost_peer_do_not_count_as_errors(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = EventLog(folder)
    log.write("failed", host="a", error="ValueError: from an earlier attempt")
    before = len(read_events(folder))
    log.write("failed", host="a", error="RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    log.write("failed", host="b", error="KeyError: 'x'")
    folder.metrics.write_text('{"step": 4}\n{"step": 5}\n{"st')
    assert read_failure(folder, before) == failure(5, ("b", "KeyError: 'x'"))


def test_a_lost_peer_is_explained_by_the_rank_that_failed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gloo = RunFolder(tmp_path), RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    seconds = (f"2026-01-01T00:00:0{second}.000Z" for second in itertools.count())
    monkeypatch.setattr("trainer.resilience.events.event_time", lambda: next(seconds))  # the clock may stand still
    EventLog(folder).write("failed", rank=1, host="old", error="ShardError: an earlier attempt")
    started, failed = "2026-01-01T00:00:00.500Z", "2026-01-01T00:00:01.500Z"
    assert cause_on_another_rank(folder, gloo, 0, started) is None
    EventLog(folder).write("failed", rank=2, host="b", error=str(gloo))
    EventLog(folder).write("failed", rank=1, host="a", error="ShardError: no such file: 3.tar")
    assert cause_on_another_rank(folder, gloo, 0, started) == "rank 1 on a failed: ShardError: no such file: 3.tar"
    assert cause_on_another_rank(folder, gloo, 1, failed) is None
    assert cause_on_another_rank(folder, ValueError("a bug"), 0, started) is None
