"""Open-file-description locks (fcntl(2), F_OFD_*): the request that `fcntl.fcntl` takes, for a whole file."""

from __future__ import annotations

import os
from struct import Struct

# struct flock on 64-bit Linux: l_type, l_whence, (pad), l_start, l_len, l_pid (zero for OFD), (pad)
_FLOCK = Struct("hh4xqqi4x")


def pack_lock(kind: int) -> bytes:
    """`kind`: F_RDLCK, F_WRLCK or F_UNLCK."""
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def lock_kind(answer: bytes) -> int:
    """What F_OFD_GETLK answered: F_UNLCK when nobody is in the way."""
    kind: int = _FLOCK.unpack(answer)[0]
    return kind
