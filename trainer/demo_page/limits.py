"""Bound what one user of the page can ask for."""

from __future__ import annotations

from dataclasses import dataclass

MOST_PIECES = 200  # of a prompt or an example
MOST_EXAMPLES = 100
MOST_CHARACTERS = 20_000  # of one text
MOST_BODY_BYTES = 8 * 2**20  # of a request that uploads no file


class UserError(ValueError):
    """Report something that a user of the page can mend; the text is shown as it is."""


@dataclass(frozen=True)
class Limits:
    """Hold the limits that flags of the command set.

    Attributes:
        upload_mib: Largest uploaded file, in MiB.
        new_tokens: Most new tokens of an answer.
        prompt_tokens: Most tokens of a prompt, examples included.
        media: Most images and videos of a prompt, examples included.
        concurrency: Answers that are computed at the same time.
        queue: Requests that wait at the same time; a further one is refused.
    """

    upload_mib: float = 20.0
    new_tokens: int = 128
    prompt_tokens: int = 2048
    media: int = 32
    concurrency: int = 1
    queue: int = 16
