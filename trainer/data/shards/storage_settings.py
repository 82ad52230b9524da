"""Hold the settings of ``data`` that storage needs, and check the cache size against them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.data_config import DataConfig
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.retries import RetryPolicy


@dataclass(frozen=True)
class StorageSettings:
    """How shards are read, and remote ones cached.

    Attributes:
        read_block: Consecutive samples of a shard that are fetched at once (``data.read_block``).
        cache_dir: Folder of the block cache (``data.cache_dir``). None takes a folder of this user in the system's
            temporary folder.
        cache_bytes: Most bytes in the block cache (``data.cache_bytes``).
        retry: How failed reads are repeated.
    """

    read_block: int = 250
    cache_dir: Path | None = None
    cache_bytes: int = 20_000_000_000
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def of(cls, config: DataConfig) -> StorageSettings:
        """Return the settings of a run."""
        retry = RetryPolicy(config.read_retries, config.read_timeout_seconds, config.read_deadline_seconds)
        return cls(config.read_block, config.cache_dir, config.cache_bytes, retry)


def check_cache_size(
    manifest: Manifest, settings: StorageSettings, num_lanes: int, shuffle_window: int, where: str
) -> None:
    """Check that the cache holds the read blocks that a process reads from at a time.

    A smaller cache would fetch a read block again for every sample.

    Args:
        manifest: Shards of one source. Local shards need no cache.
        settings: Settings of the run.
        num_lanes: Lanes of this process.
        shuffle_window: Samples of a lane that are shuffled together (``data.shuffle_window``).
        where: Begins the error message, for instance "source 'pairs'".

    Raises:
        ValueError: The cache is too small.
    """
    if not manifest.has_remote or not manifest.total_samples:
        return
    total_bytes = int(manifest.shard_bytes.sum())
    block_bytes = settings.read_block * total_bytes / manifest.total_samples
    num_blocks = -(-shuffle_window // settings.read_block) + 1
    # The prefetcher fetches the next window while this one is read, so a lane needs both.
    needed = min(int(num_lanes * 2 * num_blocks * block_bytes), total_bytes)
    if needed > settings.cache_bytes:
        raise ValueError(
            f"{where}: the {num_lanes} lanes of this process read from {needed:,} bytes of remote read blocks at a "
            f"time, more than data.cache_bytes = {settings.cache_bytes:,}. Raise it, or lower data.shuffle_window = "
            f"{shuffle_window} or data.num_lanes"
        )
