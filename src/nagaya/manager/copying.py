"""Copying between a machine and the host: tar streams made and read by the agent (docs/agent-protocol.md).

A running machine's agent does it inside; for one that does not run, its engine executes the same code on its root
(`Offline`). What comes out of a machine is hostile: it is unpacked by `images.unpack`, which never leaves its
directory.
"""

from __future__ import annotations

import json
import os
import select
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from nagaya.engines import open_engine
from nagaya.errors import HostError, NotFound, RemoteError, Unsupported, UsageError
from nagaya.manager.attachment import Attachment, Exited
from nagaya.model.state import PAUSED, RUNNING, require
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine

CHUNK = 256 << 10


class Entry(NamedTuple):
    """What the agent's `stat` says of a path."""

    type: str  # file, dir, link, char, block, fifo, socket
    mode: int


def find_entry(machine: Machine, path: str, *, follow_links: bool = False) -> Entry | None:
    """What is at `path` inside the machine; None when there is nothing."""
    argv = ("stat", path, "--follow") if follow_links else ("stat", path)
    out = bytearray()
    status, complaint = _applet(machine, argv, out.extend)
    if status:
        if "No such file" in complaint or "Not a directory" in complaint:
            return None
        raise RemoteError(f"cannot look at {machine.name}:{path}: {complaint}")
    try:
        data = json.loads(out)
        return Entry(str(data["type"]), int(data["mode"]))
    except (ValueError, KeyError, TypeError):
        raise RemoteError("the machine's agent answered nonsense to 'stat'") from None


def tar_out(machine: Machine, source: str, out: int, *, mounts: bool = True) -> None:
    """Write `source` as a tar stream to descriptor `out`; without `mounts`, what is mounted below it stays empty."""
    _check_path(source)
    if find_entry(machine, source, follow_links=source.endswith("/.")) is None:
        raise NotFound(f"there is no '{source}' in machine '{machine.name}'")
    argv = ("tar-out", source) if mounts else ("tar-out", source, "--no-mounts")
    _copy_out(machine, argv, lambda data: _write_all(out, data), source)


def tar_in(machine: Machine, target: str, source: int) -> None:
    """Unpack the tar stream from descriptor `source` into the directory `target`."""
    _check_path(target)
    _require_directory(machine, target)
    _copy_in(machine, ("tar-in", target), lambda size: os.read(source, size), target)


def copy_out(machine: Machine, source: str, target: str, *, follow_links: bool, archive: bool) -> None:
    """`cp MACHINE:SOURCE TARGET`, with Docker's rules for what the target means."""
    from nagaya.images.unpack import extract  # lazy: most commands unpack nothing

    _check_path(source)
    entry = find_entry(machine, source, follow_links=follow_links or source.endswith(("/.", "/")))
    if entry is None:
        raise NotFound(f"there is no '{source}' in machine '{machine.name}'")
    contents = source.endswith("/.")
    directory, rename = _target_on_host(target, entry.type == "dir", contents)
    argv = ("tar-out", source, "--follow") if follow_links else ("tar-out", source)
    read, write = os.pipe2(os.O_CLOEXEC)
    feeder = _Feeder(write, lambda put: _copy_out(machine, argv, put, source))
    with os.fdopen(read, "rb", buffering=1 << 20) as stream:
        feeder.start()
        try:
            extract(stream, directory, preserve_owner=archive, rename=rename)
            while stream.read(CHUNK):  # past the archive's end: what the agent still pads
                pass
        except OSError as error:
            raise HostError.from_os(error, f"cannot write {target}") from None
        finally:
            stream.close()
            feeder.join()
    feeder.raise_problem()


def copy_changes(machine: Machine, directory: str, *, locked: bool = False) -> None:
    """What is in a virtual machine's overlay, into the empty `directory` of the host, as overlayfs keeps it.

    `locked` is for who holds the machine's command lock: it does not run then.
    """
    from nagaya.images.unpack import unpack_upper  # lazy: most commands unpack nothing

    read, write = os.pipe2(os.O_CLOEXEC)
    argv = ("tar-out", "/upper/.")
    feeder = _Feeder(write, lambda put: _copy_out(machine, argv, put, "/", data_disk=True, locked=locked))
    with os.fdopen(read, "rb", buffering=1 << 20) as stream:
        feeder.start()
        try:
            unpack_upper(stream, directory)
            while stream.read(CHUNK):  # past the archive's end: what the agent still pads
                pass
        except OSError as error:
            raise HostError.from_os(error, f"cannot write {directory}") from None
        finally:
            stream.close()
            feeder.join()
    feeder.raise_problem()


def copy_in(machine: Machine, source: str, target: str, *, follow_links: bool, archive: bool) -> None:
    """`cp SOURCE MACHINE:TARGET`, with Docker's rules for what the target means."""
    import tarfile  # lazy: 8 ms, and only `cp` into a machine makes archives
    import threading

    _check_path(target)
    contents = source.endswith("/.")
    try:
        found = os.stat(source) if follow_links or contents or source.endswith("/") else os.lstat(source)
    except OSError as error:
        raise NotFound(f"there is no '{source}' on this host ({error.strerror})") from None
    is_directory = stat.S_ISDIR(found.st_mode)
    directory, name = _target_in_machine(machine, source, target, is_directory=is_directory, contents=contents)
    problems: list[BaseException] = []
    read, write = os.pipe2(os.O_CLOEXEC)

    def make_archive() -> None:
        try:
            with (
                os.fdopen(write, "wb", buffering=1 << 20) as stream,
                tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, dereference=follow_links) as tar,
            ):
                tar.add(os.path.normpath(source) if contents else source.rstrip("/") or "/", arcname=name)
        except BrokenPipeError:
            pass  # the agent gave up, and says why itself
        except (OSError, tarfile.TarError) as error:
            problems.append(error)

    thread = threading.Thread(target=make_archive, name="cp")
    thread.start()
    try:
        argv = ("tar-in", directory) if archive else ("tar-in", directory, "--no-owner")
        _copy_in(machine, argv, lambda size: os.read(read, size), target)
    finally:
        os.close(read)
        thread.join()
    if problems:
        raise HostError(f"cannot read {source}: {problems[0]}", operation="read", path=source)


class _Feeder:
    """Copies in a thread, into a pipe, so that the reader can be ordinary code. `copy` gets what to call with data."""

    def __init__(self, write: int, copy: Callable[[Callable[[bytes], object]], None]) -> None:
        import threading  # lazy: only `cp` needs a thread

        self._write = write
        self._problem: BaseException | None = None
        self._copy = partial(copy, lambda data: _write_all(write, data))
        self._thread = threading.Thread(target=self._run, name="cp")

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self._copy()
        except BrokenPipeError:
            pass  # the reader gave up, and says why itself
        except BaseException as problem:
            self._problem = problem
        finally:
            os.close(self._write)

    def join(self) -> None:
        self._thread.join()

    def raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem


def _check_path(path: str) -> None:
    if not path or "\0" in path:
        raise UsageError("a path inside the machine is missing", hint="for example nagaya cp MACHINE:/etc/hosts .")


def _require_directory(machine: Machine, path: str) -> None:
    entry = find_entry(machine, path, follow_links=True)
    if entry is None:
        raise NotFound(f"there is no directory '{path}' in machine '{machine.name}'")
    if entry.type != "dir":
        raise UsageError(f"'{path}' in machine '{machine.name}' is not a directory")


def _target_on_host(target: str, source_is_directory: bool, contents: bool) -> tuple[str, str]:
    """(directory to unpack in, new name for the archive's top, "" = as it is)."""
    if os.path.isdir(target):
        return target, ""
    if os.path.lexists(target) and source_is_directory:
        raise UsageError(f"cannot copy a directory onto the file '{target}'")
    if target.endswith("/") and not source_is_directory:
        raise NotFound(f"there is no directory '{target}' on this host", hint=f"make it first: mkdir -p {target}")
    parent, name = os.path.split(target.rstrip("/"))
    if not os.path.isdir(parent or "."):
        raise NotFound(f"there is no directory '{parent}' on this host", hint=f"make it first: mkdir -p {parent}")
    if contents:
        os.mkdir(target)
        return target, ""
    return parent or ".", name


def _target_in_machine(
    machine: Machine, source: str, target: str, *, is_directory: bool, contents: bool
) -> tuple[str, str]:
    """(directory inside the machine, name of the archive's top in it)."""
    base = os.path.basename(os.path.abspath(source))
    entry = find_entry(machine, target, follow_links=True)
    if entry is not None and entry.type == "dir":
        return target, "." if contents else base
    if entry is not None and is_directory:
        raise UsageError(f"cannot copy a directory onto the file '{target}' in machine '{machine.name}'")
    if entry is None and target.endswith("/") and not is_directory:
        raise NotFound(f"there is no directory '{target}' in machine '{machine.name}'")
    parent, name = os.path.split(target.rstrip("/"))
    _require_directory(machine, parent or "/")
    return parent or "/", name


def _copy_out(
    machine: Machine,
    argv: tuple[str, ...],
    write: Callable[[bytes], object],
    path: str,
    *,
    data_disk: bool = False,
    locked: bool = False,
) -> None:
    status, complaint = _applet(machine, argv, write, data_disk=data_disk, locked=locked)
    if status:
        raise RemoteError(f"cannot read {machine.name}:{path}: {complaint}")


def _copy_in(machine: Machine, argv: tuple[str, ...], read: Callable[[int], bytes], path: str) -> None:
    status, complaint = _applet(machine, argv, lambda data: None, read)
    if status:
        raise RemoteError(f"cannot write {machine.name}:{path}: {complaint}")


def _applet(
    machine: Machine,
    argv: tuple[str, ...],
    write: Callable[[bytes], object],
    read: Callable[[int], bytes] | None = None,
    *,
    data_disk: bool = False,
    locked: bool = False,
) -> tuple[int, str]:
    """Run one of the agent's functions to its end; its status and what it said on standard error."""
    phase = machine.state.phase
    if phase == PAUSED:
        require("exec", phase, machine.name)
    if phase == RUNNING:
        with machine.applet(argv, stdin=read is not None, data_disk=data_disk) as attachment:
            return _pump(attachment, write, read)
    with _offline(machine, argv, data_disk=data_disk, locked=locked) as streams:
        return streams(write, read)


def _offline(
    machine: Machine, argv: tuple[str, ...], *, data_disk: bool, locked: bool
) -> AbstractContextManager[Callable[[Callable[[bytes], object], Callable[[int], bytes] | None], tuple[int, str]]]:
    engine = open_engine(machine.spec.type)
    if "offline" not in engine.capabilities:
        raise Unsupported(
            f"a machine of type '{machine.spec.type}' must run for 'cp'", hint=f"nagaya start {machine.name}"
        )
    from nagaya.manager.offline import open_offline

    return open_offline(machine, argv, data_disk=data_disk, locked=locked)


def _pump(
    attachment: Attachment, write: Callable[[bytes], object], read: Callable[[int], bytes] | None
) -> tuple[int, str]:
    complaint = bytearray()
    feeding = read is not None
    while True:
        while read is not None and feeding and attachment.stdin_room() and not attachment.wants_write():
            data = read(attachment.stdin_room())
            if data:
                attachment.send_stdin(data)
            else:
                attachment.close_stdin()
                feeding = False
        if not attachment.pending():
            poll = select.poll()
            poll.register(attachment.fileno(), select.POLLIN | (select.POLLOUT if attachment.wants_write() else 0))
            poll.poll()
            attachment.flush()
        for event in attachment.receive():
            if isinstance(event, Exited):
                return event.status, (complaint.decode(errors="replace").strip() or event.error)
            if event.stream == 1:
                write(event.data)
            elif len(complaint) < 4096:
                complaint += event.data


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
