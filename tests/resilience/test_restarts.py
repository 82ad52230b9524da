"""When a failed job is started again, and on which nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.resilience.events import EventLog
from trainer.resilience.hosts import Host
from trainer.resilience.restarts import Failure, RestartPolicy, choose_hosts, read_events, read_failure

HOSTS = (Host("a", 2), Host("b", 2), Host("c", 2))


def failure(step: int, *errors: tuple[str, str]) -> Failure:
    return Failure(step, frozenset(errors))


def test_the_same_error_twice_at_the_same_update_is_a_bug() -> None:
    policy = RestartPolicy(10, 600)
    assert policy.why_stop(failure(7, ("a", "KeyError: x")), now=0) is None
    why = policy.why_stop(failure(7, ("b", "KeyError: x")), now=1)
    assert why is not None and "same error twice after update 7" in why and "KeyError: x" in why


@pytest.mark.parametrize("second", [failure(8, ("a", "KeyError: x")), failure(7, ("a", "OSError: y")), failure(7)])
def test_another_error_or_another_update_is_none(second: Failure) -> None:
    policy = RestartPolicy(10, 600)
    assert policy.why_stop(failure(7, ("a", "KeyError: x")), now=0) is None
    assert policy.why_stop(second, now=1) is None


def test_too_many_restarts_in_the_time_end_it_and_old_ones_do_not_count() -> None:
    policy = RestartPolicy(2, 100)
    assert [policy.why_stop(failure(step), now) for step, now in ((1, 0), (2, 60), (3, 130))] == [None] * 3
    why = policy.why_stop(failure(4), now=140)
    assert why is not None and "--restarts" in why


def test_a_host_that_fails_alone_twice_is_suspect() -> None:
    policy = RestartPolicy(10, 600)
    policy.why_stop(failure(3, ("b", "RuntimeError: ECC")), now=0)
    policy.why_stop(failure(4, ("a", "ValueError: z"), ("b", "ValueError: z")), now=1)
    assert policy.suspects == frozenset()
    policy.why_stop(failure(5, ("b", "RuntimeError: ECC")), now=2)
    assert policy.suspects == {"b"}
    assert [host.name for host in choose_hosts(HOSTS, (), policy.suspects, [2, 4, 6])] == ["a", "c"]
    assert choose_hosts(HOSTS[1:2], (), policy.suspects, [2]) == (Host("b", 2),), "better than nothing"


@pytest.mark.parametrize(
    ("silent", "allowed", "expected"),
    [
        ((), [1, 2, 3, 6], [("a", 2), ("b", 2), ("c", 2)]),
        (("b",), [1, 2, 4], [("a", 2), ("c", 2)]),
        ((), [1, 2, 4, 8], [("a", 2), ("b", 2)]),
        (("a",), [1, 3], [("b", 1)]),
        ((), [3], [("a", 1), ("b", 1), ("c", 1)]),
        (("a", "b"), [4], []),
    ],
)
def test_the_largest_world_that_the_batches_allow(
    silent: tuple[str, ...], allowed: list[int], expected: list[tuple[str, int]]
) -> None:
    assert [(host.name, host.slots) for host in choose_hosts(HOSTS, silent, (), allowed)] == expected


def test_what_a_process_says_of_another_that_is_gone_is_no_error_of_its_own(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("failed", host="a", error="ValueError: from an earlier attempt")
    before = len(read_events(tmp_path))
    log.write("failed", host="a", error="RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    log.write("failed", host="b", error="KeyError: 'x'")
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"st')
    assert read_failure(tmp_path, before) == failure(5, ("b", "KeyError: 'x'"))
