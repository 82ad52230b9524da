"""Repeat reads that fail for a while, from remote storage and from the disks of a network.

A failure is permanent or passing. Another attempt cannot cure a permanent one (missing, forbidden, changed). A passing
one (a busy server, a cut answer, a stale handle of NFS) is followed by further attempts until a deadline. The waits
between them double and are drawn at random, so that a thousand processes that failed together do not return together.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_LOG = logging.getLogger(__name__)
_random = random.SystemRandom()  # forked processes would share the state of any other generator
# A storage that never answered this process is given up after this time: a wrong name, a dead host, no credentials.
FIRST_CONTACT_SECONDS = 5.0
# What NFS, Lustre, FUSE and SAN disks report while a server or a path is away.
_PASSING_ERRNOS = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO),
        *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ESHUTDOWN, errno.EPIPE),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLINK, errno.ECOMM),
    }
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """How long and how often a read is tried.

    Attributes:
        retries: Further attempts after the first one failed (``data.read_retries``).
        timeout_seconds: Seconds of silence that end an attempt (``data.read_timeout_seconds``).
        deadline_seconds: Seconds for all attempts together (``data.read_deadline_seconds``).
        first_wait_seconds: Longest wait before the second attempt. It doubles with each further attempt.
        longest_wait_seconds: Bound of the doubled waits.
    """

    retries: int = 10
    timeout_seconds: float = 30.0
    deadline_seconds: float = 300.0
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 20.0


class PermanentFailure(Exception):
    """Another attempt cannot help.

    Attributes:
        reason: Identifier, for counting.
        detail: Explanation for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class PassingFailure(Exception):
    """Another attempt may help.

    Attributes:
        reason: Identifier, for counting.
        detail: Explanation for a person.
        retry_after: Seconds that the server asks to wait.
    """

    def __init__(self, reason: str, detail: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.retry_after = reason, detail, retry_after


class UnreachableFailure(PassingFailure):
    """The storage gave no answer at all, or does not know us: it passes only if the storage has answered before."""


def repeat(
    attempt: Callable[[float], Result], policy: RetryPolicy, where: str, *, answered_before: bool = True
) -> Result:
    """Call ``attempt`` until it succeeds, and return its result.

    Args:
        attempt: The read. Its argument is the time (``time.monotonic``) at which it has to end.
        policy: How often and how long.
        where: The file or url, for the log.
        answered_before: Whether this process has read from the storage before. If not, an ``UnreachableFailure`` is
            final after ``FIRST_CONTACT_SECONDS``.

    Raises:
        PermanentFailure: Another attempt cannot help.
        PassingFailure: All attempts failed; the detail says how many.
    """
    start = time.monotonic()
    stop = start + policy.deadline_seconds
    for number in range(policy.retries + 1):
        try:
            return attempt(stop)
        except PassingFailure as error:
            last = error
        give_up = stop
        if isinstance(last, UnreachableFailure) and not answered_before:
            give_up = min(stop, start + FIRST_CONTACT_SECONDS)
        longest = min(policy.longest_wait_seconds, policy.first_wait_seconds * 2.0 ** min(number, 30))
        wait = max(_random.uniform(0, longest), last.retry_after)
        if number == policy.retries or time.monotonic() + wait >= give_up:
            break
        _LOG.warning(
            "%s: %s: %s; retry %d of %d in %.1f s", where, last.reason, last.detail, number + 1, policy.retries, wait
        )
        time.sleep(wait)
    detail = f"{last.detail}; gave up after {number + 1} attempts in {time.monotonic() - start:.1f} s"
    raise type(last)(last.reason, detail) from last.__cause__


def disk_failure(error: OSError) -> PermanentFailure | PassingFailure:
    """Classify an error of a local file system."""
    kind = PassingFailure if error.errno in _PASSING_ERRNOS else PermanentFailure
    return kind(errno.errorcode.get(error.errno or 0, "unreadable"), error.strerror or str(error))


def repeat_disk(read: Callable[[], Result], policy: RetryPolicy, where: str) -> Result:
    """Call ``read`` until it succeeds, or raises an error of the file system that does not pass.

    Raises:
        OSError: The read failed for good; the message says after how many attempts.
    """

    def attempt(_: float) -> Result:
        try:
            return read()
        except OSError as error:
            raise disk_failure(error) from error

    try:
        return repeat(attempt, policy, where)
    except (PermanentFailure, PassingFailure) as failure:
        cause = failure.__cause__
        passing = isinstance(failure, PassingFailure)
        detail = f"{failure.detail} (data.read_retries, data.read_deadline_seconds)" if passing else failure.detail
        raise OSError(cause.errno if isinstance(cause, OSError) else errno.EIO, detail) from cause
