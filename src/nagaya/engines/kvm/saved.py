"""A machine's memory and state on disk: a directory of two files. docs/snapshots.md has the format.

    memory    the guest's RAM as a sparse file, at its offsets; pages of zeros are holes
    state     one line that says what this is and sums up the rest; then JSON: all but the memory

Whoever writes a directory writes `state` last, under another name, and renames it: a directory without is none.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator

from nagaya import __version__
from nagaya.errors import HostError, IntegrityError, Unsupported
from nagaya.memory import GuestMemory
from nagaya.static import Any, NamedTuple

FORMAT = 1
"""To be raised with every change to what any part of the VMM saves."""
MEMORY, STATE = "memory", "state"
_MAGIC = "nagaya-saved"
_MOST_STATE_BYTES = 16 << 20
_HEAD_BYTES = 128
_SUM_BYTES = 128 << 10  # of memory, for each of its sums


class Saved(NamedTuple):
    """What was read: the state's parts, and the memory file, open for reading. `close` is the caller's."""

    directory: str
    state: dict[str, Any]
    memory_fd: int

    def map_memory(self, *, shared: bool) -> GuestMemory:
        """The guest's memory: copy-on-write, or with `shared` a copy of its own that other processes can be shown.

        Raises `HostError`.
        """
        size_bytes = self.state["memory_bytes"]
        if shared:
            return GuestMemory.copy_of(self.memory_fd, size_bytes)
        try:
            return GuestMemory(os.dup(self.memory_fd), size_bytes, private=True)
        except OSError as error:
            raise HostError.from_os(error, "cannot map the saved memory") from None

    def close(self) -> None:
        os.close(self.memory_fd)


class Files(NamedTuple):
    """The two files of a directory, being written: whoever writes them needs no right to the directory."""

    memory_fd: int
    state_fd: int

    def close(self) -> None:
        os.close(self.memory_fd)
        os.close(self.state_fd)


def create(directory: str) -> Files:
    """Begin in the empty `directory`. Raises `OSError`; the files are the caller's to close, and to `commit`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    memory_fd = os.open(f"{directory}/{MEMORY}", flags, 0o600)
    try:
        return Files(memory_fd, os.open(f"{directory}/{STATE}.tmp", flags, 0o600))
    except BaseException:
        os.close(memory_fd)
        raise


def write(files: Files, memory: GuestMemory, state: dict[str, Any]) -> None:
    """Save a machine that stands. Raises `OSError`."""
    used = memory.write_to(files.memory_fd)
    sums = _sum(files.memory_fd, memory.size_bytes)
    parts = {
        "version": __version__, "memory_bytes": memory.size_bytes, "used_bytes": used, "sums": sums,
        "file": _identify(files.memory_fd), **state,
    }  # fmt: skip
    body = json.dumps(parts, separators=(",", ":")).encode()
    data = memoryview(f"{_MAGIC} {FORMAT} {len(body)} {zlib.crc32(body):08x}\n".encode() + body)
    while data:
        data = data[os.write(files.state_fd, data) :]


def commit(directory: str) -> None:
    """What was written is whole. Raises `OSError`."""
    os.rename(f"{directory}/{STATE}.tmp", f"{directory}/{STATE}")


def read(directory: str, *, check_memory: bool = True) -> Saved:
    """Open what `write` wrote, by whomever it was changed since.

    `check_memory` sums it all up (a second per GB), unless it is the very file that was written, and was not written to
    since; without, only its size is looked at. Raises `IntegrityError` for what
    is damaged, `Unsupported` for another version's, `HostError`.
    """
    state = read_state(directory)
    try:
        fd = os.open(f"{directory}/{MEMORY}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise IntegrityError(f"the saved machine in {directory} has no memory", hint=_HINT) from None
    except OSError as error:
        raise HostError.from_os(error, "cannot open the saved memory") from None
    try:
        size = os.fstat(fd).st_size
        if size != state["memory_bytes"]:
            raise IntegrityError(
                f"the saved memory in {directory} has {size} bytes instead of {state['memory_bytes']}", hint=_HINT
            )
        if check_memory and _identify(fd) != state.get("file") and _sum(fd, size) != state["sums"]:
            raise IntegrityError(f"the saved memory in {directory} is damaged", hint=_HINT)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise HostError.from_os(error, "cannot read the saved memory") from None
        raise
    return Saved(directory, state, fd)


_HINT = "it cannot be gone on from; remove it, and save the machine again"


def read_state(directory: str) -> dict[str, Any]:
    """All but the memory. Raises as `read`."""
    path = f"{directory}/{STATE}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise IntegrityError(f"there is no saved machine in {directory}", hint=_HINT) from None
    except OSError as error:
        raise HostError.from_os(error, "cannot open the saved machine") from None
    try:
        size = os.fstat(fd).st_size
        data = os.read(fd, min(size, _MOST_STATE_BYTES))
    except OSError as error:
        raise HostError.from_os(error, "cannot read the saved machine") from None
    finally:
        os.close(fd)
    head, _, body = data.partition(b"\n")
    words = head[:_HEAD_BYTES].split(b" ")
    if words[0] != _MAGIC.encode() or len(words) != 4:
        raise IntegrityError(f"{path} is not the state of a saved machine", hint=_HINT)
    if words[1] != b"%d" % FORMAT:
        raise Unsupported(
            "the machine was saved by another version of Nagaya, whose format is another one",
            hint="restore it with that version, or start the machine anew",
            finding=f"format {words[1].decode('ascii', 'replace')}; this is format {FORMAT}",
        )
    if words[2] != b"%d" % len(body) or words[3] != b"%08x" % zlib.crc32(body):
        raise IntegrityError(f"{path} is damaged", hint=_HINT)
    state = json.loads(body)
    if not (isinstance(state, dict) and _is_whole(state)):
        raise IntegrityError(f"{path} does not say what a saved machine is", hint=_HINT)
    if state["version"] != __version__:
        raise Unsupported(
            f"the machine was saved by Nagaya {state['version']}, and this is {__version__}",
            hint="restore it with that version, or start the machine anew",
        )
    return state


def _is_whole(state: dict[str, Any]) -> bool:
    kinds = {
        "version": str, "memory_bytes": int, "used_bytes": int, "sums": list, "hardware": dict, "kvm": str, "cpu": str,
        "leaves": list, "vm": dict, "vcpus": list, "devices": list, "notes": dict,
    }  # fmt: skip
    return all(isinstance(state.get(name), kind) for name, kind in kinds.items())


def _identify(fd: int) -> list[int]:
    """A file, and its last change."""
    status = os.fstat(fd)
    return [status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size]


def _sum(fd: int, size_bytes: int) -> list[list[int]]:
    """[offset, CRC-32] of each piece of memory that has something in it, wherever the file has holes."""
    import mmap

    sums, nothing = [], zlib.crc32(bytes(_SUM_BYTES))
    with mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as map_, memoryview(map_) as view:
        for at in _pieces(fd, size_bytes):
            summed = zlib.crc32(view[at : at + _SUM_BYTES])
            if summed != nothing:
                sums.append([at, summed])
    return sums


def _pieces(fd: int, size_bytes: int) -> Iterator[int]:
    at = 0
    while at < size_bytes:
        try:
            found = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole follows
            return
        at = found - found % _SUM_BYTES
        yield at
        at += _SUM_BYTES
