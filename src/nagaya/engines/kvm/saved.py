"""A machine's memory and state on disk: a directory of two files. docs/snapshots.md has the format.

    memory    the guest's RAM as a sparse file, at its offsets; pages of zeros are holes
    state     one line that says what this is and sums up the rest; then JSON: all but the memory

Of one that is a *difference*, the file has those pages alone that are not what they are in another directory, its base.

Whoever writes a directory writes `state` last, under another name, and renames it: a directory without is none.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from nagaya import __version__
from nagaya.engines.kvm.saved_pages import Layer, apply, fold, write_changed
from nagaya.errors import HostError, IntegrityError, Unsupported
from nagaya.memory import PAGE_BYTES, GuestMemory
from nagaya.static import Any, NamedTuple

FORMAT = 2
"""To be raised with every change to what any part of the VMM saves."""
MEMORY, STATE = "memory", "state"
_MAGIC = "nagaya-saved"
_MOST_STATE_BYTES = 16 << 20
_HEAD_BYTES = 128
_SUM_BYTES = 128 << 10  # of memory, for each of its sums
_MARK_BYTES = 8
MOST_BASES = 16
"""Below one difference. Each is one more place to look for a page."""
_PLACE = r"\.\./\.\./[0-9a-f]{16}/memory"
"""A base is another snapshot's memory, of the same machine (storage/snapshots.py)."""
_MOST_RUNS = 1 << 18  # of pages that are not beside each other: their list would be larger than the pages


class Saved(NamedTuple):
    """What was read: the state's parts, and the memory's files, open for reading. `close` is the caller's.

    `memory_fd` has it all, or is the last base's, and `layers` go over it, the oldest first.
    """

    directory: str
    state: dict[str, Any]
    memory_fd: int
    layers: tuple[Layer, ...] = ()

    @property
    def fds(self) -> tuple[int, ...]:
        """For a child that is to keep them."""
        return (self.memory_fd, *(layer.fd for layer in self.layers))

    def map_memory(self, *, shared: bool) -> GuestMemory:
        """The guest's memory: copy-on-write, or with `shared` a copy of its own that other processes can be shown.

        Raises `HostError`.
        """
        size_bytes = self.state["memory_bytes"]
        try:
            if shared:
                memory = GuestMemory.copy_of(self.memory_fd, size_bytes)
            else:
                memory = GuestMemory(os.dup(self.memory_fd), size_bytes, private=True)
            for layer in self.layers:
                apply(layer, memory)
        except OSError as error:
            raise HostError.from_os(error, "cannot map the saved memory") from None
        return memory

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def pack(base: Saved) -> dict[str, Any]:
    """What another process needs to know of it, beside its `fds`, to save a difference."""
    return {
        "state": {"mark": base.state["mark"], "memory_bytes": base.state["memory_bytes"]},
        "layers": [[layer.held, layer.zeros] for layer in base.layers],
    }  # fmt: skip


def unpack(packed: dict[str, Any], fds: list[int]) -> Saved:
    """What `pack` has packed."""
    layers = tuple(Layer(fd, *runs) for fd, runs in zip(fds[1:], packed["layers"], strict=True))
    return Saved("", packed["state"], fds[0], layers)


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


def write(
    files: Files,
    memory: GuestMemory,
    state: dict[str, Any],
    *,
    base: Saved | None = None,
    place: str = "",
    look_up: Callable[[], None] = lambda: None,
) -> None:
    """Save a machine that stands, or the copy-on-write image of one. Raises `OSError`.

    With `base`, that which is otherwise there; `place` is then its directory, seen from the one that is written. What
    `look_up` raises, now and then, ends it.
    """
    parts: dict[str, Any] = {"base": None}
    if base is not None:
        held, zeros, used = write_changed(files.memory_fd, memory, base, look_up)
        if len(held) + len(zeros) <= _MOST_RUNS:
            parts = {"base": {"place": place, "mark": base.state["mark"]}, "held": held, "zeros": zeros}
        else:
            os.ftruncate(files.memory_fd, 0)
    if parts["base"] is None:
        used = memory.write_to(files.memory_fd, look_up)
    write_state(files, memory.size_bytes, used, {**state, **parts})


def write_state(files: Files, memory_bytes: int, used: int, state: dict[str, Any]) -> None:
    """Sum up the memory's file, and write all that is not in it. Raises `OSError`."""
    sums = _sum(files.memory_fd, memory_bytes)
    parts = {
        "mark": os.urandom(_MARK_BYTES).hex(), **state, "version": __version__, "memory_bytes": memory_bytes,
        "used_bytes": used, "sums": sums, "file": _identify(files.memory_fd),
    }  # fmt: skip
    body = json.dumps(parts, separators=(",", ":")).encode()
    data = memoryview(f"{_MAGIC} {FORMAT} {len(body)} {zlib.crc32(body):08x}\n".encode() + body)
    while data:
        data = data[os.write(files.state_fd, data) :]


def find_base(directory: str) -> str:
    """The directory that it is a difference to; "" for one that is whole. Raises as `read_state`."""
    base = read_state(directory)["base"]
    return os.path.normpath(f"{directory}/{base['place']}") if base is not None else ""


def fold_base(directory: str, target: str) -> None:
    """Write into the empty directory `target` the same machine, which does without the base of `directory`.

    Raises as `read`, and `OSError`.
    """
    state = read_state(directory)
    base = read_state(f"{directory}/{state['base']['place']}")
    with ExitStack() as stack:
        fds = []
        for where, what in ((directory, state), (f"{directory}/{state['base']['place']}", base)):
            fds.append(_open_memory(where, what, check=True))
            stack.callback(os.close, fds[-1])
        files = create(target)
        stack.callback(files.close)
        upper = Layer(fds[0], state["held"], state["zeros"])
        lower = fds[1] if base["base"] is None else Layer(fds[1], base["held"], base["zeros"])
        held, zeros, used = fold(upper, lower, files.memory_fd, state["memory_bytes"])
        parts = {"base": base["base"], "held": held, "zeros": zeros}
        write_state(files, state["memory_bytes"], used, {**state, **parts})
    commit(target)


def commit(directory: str) -> None:
    """What was written is whole. Raises `OSError`."""
    os.rename(f"{directory}/{STATE}.tmp", f"{directory}/{STATE}")


def read(directory: str, *, check_memory: bool = True) -> Saved:
    """Open what `write` wrote, by whomever it was changed since, and its bases.

    `check_memory` sums it all up (a second per GB), unless it is the very file that was written, and was not written to
    since; without, only its size is looked at. Raises `IntegrityError` for what
    is damaged, `Unsupported` for another version's, `HostError`.
    """
    top: dict[str, Any] | None = None
    layers: list[Layer] = []
    fds: list[int] = []
    where, mark = directory, ""
    try:
        while True:
            state = read_state(where)
            if mark and state["mark"] != mark:
                raise IntegrityError(
                    f"what the saved machine in {directory} is based on is not there any more", hint=_HINT
                )
            if top is None:
                top = state
            elif state["memory_bytes"] != top["memory_bytes"] or len(fds) > MOST_BASES:
                raise IntegrityError(f"what the saved machine in {directory} is based on does not fit it", hint=_HINT)
            fds.append(_open_memory(where, state, check=check_memory))
            if state["base"] is None:
                return Saved(directory, top, fds[-1], tuple(reversed(layers)))
            layers.append(Layer(fds[-1], state["held"], state["zeros"]))
            where, mark = f"{where}/{state['base']['place']}", state["base"]["mark"]
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise HostError.from_os(error, "cannot read the saved memory") from None
        raise


def _open_memory(directory: str, state: dict[str, Any], *, check: bool) -> int:
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
        if check and _identify(fd) != state.get("file") and _sum(fd, size) != state["sums"]:
            raise IntegrityError(f"the saved memory in {directory} is damaged", hint=_HINT)
    except BaseException:
        os.close(fd)
        raise
    return fd


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
        "leaves": list, "vm": dict, "vcpus": list, "devices": list, "notes": dict, "mark": str,
    }  # fmt: skip
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        return False
    base = state.get("base")
    return base is None or (
        isinstance(base, dict)
        and isinstance(base.get("mark"), str)
        and isinstance(base.get("place"), str)
        and re.fullmatch(_PLACE, base["place"]) is not None
        and all(_are_runs(state.get(name), state["memory_bytes"]) for name in ("held", "zeros"))
    )


def _are_runs(runs: object, memory_bytes: int) -> bool:
    """Whether they are [first page, how many] within the memory."""
    return isinstance(runs, list) and all(
        isinstance(run, list)
        and len(run) == 2
        and all(type(number) is int for number in run)
        and run[0] >= 0
        and 0 < run[1] <= memory_bytes // PAGE_BYTES - run[0]
        for run in runs
    )


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
