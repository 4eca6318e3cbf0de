"""What a source says of the machine that it wants to send, before anything else."""

from __future__ import annotations

import os
import stat

from nagaya.errors import HostError, IntegrityError
from nagaya.model.spec import MachineSpec
from nagaya.static import NamedTuple
from nagaya.storage import records

_HEX = frozenset("0123456789abcdef")


class Offer(NamedTuple):
    """`id` is the migration's own: by it, and not by the machine's, both sides know later on what came of it."""

    id: str
    version: str  # of the source's Nagaya
    spec: MachineSpec  # with its addresses, which it keeps
    started_ns: int
    restarts: int
    disk_bytes: int
    root_bytes: int
    root_digest: str
    engine: str  # JSON of the engine's own: what the machine is made of, for the target's engine to compare


def parse_offer(data: object) -> Offer:
    """Check the form of it. Raises `IntegrityError`."""
    offer = records.from_data(Offer, data, what="the offered machine")
    for text in (offer.id, offer.spec.id):
        if len(text) != 32 or not _HEX.issuperset(text):
            raise IntegrityError("the offered machine has an id that is none")
    if min(offer.disk_bytes, offer.root_bytes, offer.started_ns, offer.restarts) < 0:
        raise IntegrityError("the offered machine has sizes that are none")
    return offer


def digest_root(path: str) -> tuple[int, str]:
    """(bytes, "sha256:…") of a root image: the guest knows its blocks by number. Raises `HostError`."""
    import hashlib  # lazy: rare

    total = hashlib.sha256()
    size = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise IntegrityError(f"the root image {path} is no file")
            while data := os.read(fd, 1 << 20):
                total.update(data)
                size += len(data)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError.from_os(error, "cannot read the machine's root image") from None
    return size, f"sha256:{total.hexdigest()}"
