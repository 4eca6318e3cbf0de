"""What QEMU tells of a machine's work, which is only QEMU's word: checked."""

from __future__ import annotations


def block_bytes(answer: object) -> tuple[int, int]:
    """The sums of query-blockstats, (read, written); -1 where QEMU tells nothing of the kind."""
    read = written = 0
    try:
        for device in answer:  # type: ignore[attr-defined]
            read += int(device["stats"]["rd_bytes"])
            written += int(device["stats"]["wr_bytes"])
    except (TypeError, KeyError, ValueError):
        return -1, -1
    return read, written
