"""Files that `nagaya snapshot save` has written, changed in ways that their sums do not tell."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nagaya.storage import snapshot_file, snapshots
from nagaya.storage.snapshot_file import Head, Reader
from nagaya.storage.snapshots import Snapshot


def rewrite(
    source: Path, target: Path, place: Path,
    *,
    record: Callable[[Snapshot], Snapshot] = lambda snapshot: snapshot,
    state: Callable[[dict[str, Any]], None] = lambda state: None,
) -> None:  # fmt: skip
    """The same file with another record, or another state of a machine of type kvm, and sums that are right.

    `place` is an empty directory to work in.
    """
    with source.open("rb") as file:
        reader = Reader(file)
        head = reader.head()
        reader.extract(head, str(place), lambda moved: None)
    saved = place / "memory" / "state"
    if saved.exists() and head.snapshot.spec.type == "kvm":
        first, _, body = saved.read_bytes().partition(b"\n")
        data = json.loads(body)
        state(data)
        body = json.dumps(data).encode()
        magic, format_, *_ = first.split(b" ")
        saved.write_bytes(b"%s %s %d %08x\n" % (magic, format_, len(body), zlib.crc32(body)) + body)
    brought = {}
    for name in ("root.img", "image.tar"):
        if (place / name).exists():
            os.rename(place / name, place.parent / f"{place.name}.{name}")
            brought[name] = str(place.parent / f"{place.name}.{name}")
    parts = snapshots.sum_parts(str(place))
    changed = snapshots.store(str(place), record(head.snapshot._replace(parts=parts)))
    with target.open("wb") as out:
        snapshot_file.write(
            out,
            Head(changed, head.members, head.root_digest),
            lambda member: brought.get(member.name, f"{place}/{member.name}"),
            lambda moved: None,
        )


def damaged(source: Path, place: Path) -> dict[str, Path]:
    """Copies of a file that are not whole, by what was done to them."""
    data = source.read_bytes()
    middle, head = len(data) // 2, data.index(b"\n")
    flipped = bytearray(data)
    flipped[middle] ^= 1
    made = {
        "cut off in its middle": data[:middle], "cut off at its end": data[:-1], "one bit another": bytes(flipped),
        "something behind it": data + b"x", "nothing": b"", "no snapshot": b"PK\x03\x04" + data[4:],
        "its head cut off": data[: head + 100], "its head another": data[: head + 50] + b"?" + data[head + 51 :],
        "another format": data.replace(b"nagaya-snapshot 1 ", b"nagaya-snapshot 2 ", 1),
        "a head without end": b"nagaya-snapshot 1 99999999999 00000000\n" + data,
        "a tail that is another": data[:-32] + bytes(32),
    }  # fmt: skip
    paths = {}
    for number, (what, content) in enumerate(made.items()):
        paths[what] = place / f"damaged-{number}"
        paths[what].write_bytes(content)
    return paths
