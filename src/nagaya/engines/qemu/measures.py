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


def forwarded_port(answer: object) -> int:
    """The host's port in `info usernet`'s first line of a forwarding; 0 without one.

    "  TCP[HOST_FORWARD]  12       127.0.0.1 40935       10.0.2.15    22    0     0"
    """
    for line in str(answer).splitlines():
        words = line.split()
        if len(words) > 3 and words[0] == "TCP[HOST_FORWARD]" and words[3].isdigit():
            return int(words[3])
    return 0
