"""What a store has done and what it holds, as numbers."""

from dataclasses import dataclass

COUNTED = ("hits", "disk_hits", "misses", "evictions", "too_large", "refused")


@dataclass(frozen=True)
class StoreStatistics:
    """What a `MemoryStore` has done since it was made, and what it holds now.

    Attributes:
        hits: images found in memory, or seen earlier in the same call.
        disk_hits: images read from the directory.
        misses: images that had to be computed.
        evictions: images removed from memory to make room for others.
        too_large: images larger than a budget by themselves, of memory or of disk.
        refused: files that were bad.
        entries, bytes: images held in memory.
        disk_entries, disk_bytes: files in the directory, whoever wrote them.
    """

    hits: int
    disk_hits: int
    misses: int
    evictions: int
    too_large: int
    refused: int
    entries: int
    bytes: int
    disk_entries: int
    disk_bytes: int
