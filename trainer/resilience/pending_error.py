"""Keep an error of one rank until all ranks can end together.

A rank that raised at once would leave the others in a collective. They learn of the error in the all-reduce that every
step has anyway, so a normal step gets no further collective.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.errors import TrainerError
from trainer.runtime.distributed import World, raise_on_all_ranks


class PendingError:
    """Run work of this rank, and remember its first error."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._error: Exception | None = None

    @property
    def exists(self) -> bool:
        """Whether work of this rank failed; other ranks may differ."""
        return self._error is not None

    def attempt(self, work: Callable[[], None]) -> None:
        """Run the work, unless earlier work failed: its record would lack the steps in between."""
        if self._error is not None:
            return
        try:
            work()
        except (OSError, TrainerError) as error:
            self._error = error

    def raise_everywhere(self) -> None:
        """Raise on all ranks if work of any rank failed, as ``raise_on_all_ranks`` does; a collective."""
        raise_on_all_ranks(self._error, self._world)
