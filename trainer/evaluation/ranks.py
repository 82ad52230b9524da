"""Let the processes of an evaluation agree; a single one needs no process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from trainer.runtime.distributed import World, barrier, failing_together


@dataclass(frozen=True)
class Ranks:
    """Describe the processes of an evaluation, as one of them sees it.

    Attributes:
        world: Processes; None where there is only this one, which joined no group.
        synced: Whether every module is a collective (ZeRO-3), so that all ranks run the same modules.
    """

    world: World | None = None
    synced: bool = False

    @property
    def rank(self) -> int:
        """Number of this process."""
        return 0 if self.world is None else self.world.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.world is None else self.world.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world is not None:
            barrier()

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Run work of this rank; if it fails on one rank, all raise. A collective at its end."""
        with nullcontext() if self.world is None else failing_together(self.world):
            yield
