"""Where a migration's other side is: unix:PATH, tcp:HOST:PORT, exec:COMMAND, or - for standard input and output."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from nagaya.errors import HostError, LaunchError, UsageError
from nagaya.kernel import unix
from nagaya.static import NamedTuple

EXAMPLES = "unix:/run/migrate.sock, tcp:192.0.2.1:7007, exec:'ssh host nagaya migrate receive -', or -"
_CONNECT_WITHIN_S = 10.0
_END_WITHIN_S = 5.0


class Address(NamedTuple):
    """`kind` is "unix" (`path`), "tcp" (`host`, `port`), "exec" (`path` is the command) or "-"."""

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0


def parse_address(text: str) -> Address:
    """Raises `UsageError`."""
    kind, _, rest = text.partition(":")
    if text == "-":
        return Address("-")
    if kind in ("unix", "exec") and rest:
        return Address(kind, os.path.abspath(rest) if kind == "unix" else rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536:
        return Address("tcp", host=host.removeprefix("[").removesuffix("]"), port=int(port))
    raise UsageError(f"'{text}' is no address of a migration", hint=f"for example {EXAMPLES}")


@contextmanager
def connect(address: Address) -> Iterator[tuple[int, int]]:
    """The stream to a target that listens, or that a command starts: (to read, to write). Raises `HostError`."""
    if address.kind == "-":
        yield 0, 1
        return
    if address.kind == "exec":
        with _run(address.path) as fd:
            yield fd, fd
        return
    fd = _connect(address)
    try:
        yield fd, fd
    finally:
        os.close(fd)


def _connect(address: Address) -> int:
    try:
        if address.kind == "unix":
            return unix.connect(os.path.dirname(address.path), os.path.basename(address.path))
        made = socket.create_connection((address.host, address.port), _CONNECT_WITHIN_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made.detach()
    except OSError as error:
        raise HostError.from_os(
            error, f"cannot reach {describe(address)}", hint="is 'nagaya migrate receive' listening there?"
        ) from None


@contextmanager
def _run(command: str) -> Iterator[int]:
    """A command with the stream as its standard input and output; our end. It ends with the stream."""
    ours, theirs = unix.socket_pair()
    try:
        process = subprocess.Popen(["/bin/sh", "-c", command], stdin=theirs, stdout=theirs)
    except OSError as error:
        os.close(ours)
        raise LaunchError(f"cannot run '{command}': {error.strerror}", command=command) from None
    finally:
        os.close(theirs)
    try:
        yield ours
    finally:
        os.close(ours)
        try:
            process.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listen(address: Address) -> int:
    """A listening socket, for `unix` and `tcp`. One in the file system is its owner's alone. Raises `HostError`."""
    try:
        if address.kind == "unix":
            before = os.umask(0o177)
            try:
                fd = unix.listen(os.path.dirname(address.path), os.path.basename(address.path))
            finally:
                os.umask(before)
        else:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            fd = socket.create_server((address.host, address.port), family=family, backlog=8).detach()
        os.set_blocking(fd, True)
        return fd
    except OSError as error:
        raise HostError.from_os(error, f"cannot listen at {describe(address)}") from None


def describe(address: Address) -> str:
    """As the user has it."""
    if address.kind == "tcp":
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"tcp:{host}:{address.port}"
    return "-" if address.kind == "-" else f"{address.kind}:{address.path}"
