"""Open-file-description locks (fcntl(2), F_OFD_*): the request that `fcntl.fcntl` takes, for a whole file or a part of it."""

from __future__ import annotations

import os
from struct import Struct

# struct flock on 64-bit Linux: l_type, l_whence, (pad), l_start, l_len, l_pid (zero for OFD), (pad)
_FLOCK = Struct("hh4xqqi4x")


def pack_lock(kind: int, *, start: int = 0, length: int = 0) -> bytes:
    """`kind`: F_RDLCK, F_WRLCK or F_UNLCK. `length` 0 = to the end of the file, however long it becomes."""
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def lock_kind(answer: bytes) -> int:
    """What F_OFD_GETLK answered: F_UNLCK when nobody is in the way."""
    kind: int = _FLOCK.unpack(answer)[0]
    return kind
