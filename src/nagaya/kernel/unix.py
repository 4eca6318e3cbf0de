"""Unix stream sockets as plain descriptors.

Uses `_socket`, the C module below `socket`: the latter spends 4 ms on making enumerations, and a start has 40.
"""

from __future__ import annotations

import _socket
import errno
import os
import sys

SOMAXCONN = 128
_MOST_FDS = 4


def socket_pair() -> tuple[int, int]:
    """Two connected, close-on-exec stream sockets."""
    first, second = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
    fds = first.detach(), second.detach()
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def _short(directory: int, name: str) -> str:
    # sun_path holds 108 bytes; going through our own descriptor makes any store's depth fit.
    return f"/proc/self/fd/{directory}/{name}"


def listen(directory: str, name: str) -> int:
    """A listening, non-blocking socket `directory/name`, replacing a dead one's file."""
    where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    made = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK, 0)
    try:
        try:
            os.unlink(name, dir_fd=where)
        except FileNotFoundError:
            pass
        made.bind(_short(where, name))
        made.listen(SOMAXCONN)
    except BaseException:
        made.close()
        raise
    finally:
        os.close(where)
    return made.detach()


def send_with_fds(fd: int, data: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send all of `data` on a blocking stream socket, and a copy of each of `fds` with it. Raises `OSError`."""
    end = _socket.socket(fileno=os.dup(fd))
    try:
        packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        sent = end.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if fds else [])
        end.sendall(data[sent:])
    finally:
        end.close()


def receive_fds(fd: int, count: int) -> list[int]:
    """So many descriptors, close-on-exec, that came by `send_with_fds` on a blocking socket. Raises `OSError`."""
    end = _socket.socket(fileno=os.dup(fd))
    try:
        _, rights, _, _ = end.recvmsg(1, _socket.CMSG_SPACE(4 * count), _socket.MSG_CMSG_CLOEXEC)
    finally:
        end.close()
    found = [number for _, _, packed in rights for number in memoryview(packed).cast("i")]
    if len(found) != count:
        for number in found:
            os.close(number)
        raise OSError(errno.EPROTO, f"{len(found)} descriptors instead of {count}")
    return found


def receive_with_fds(fd: int, most_bytes: int) -> tuple[bytes, list[int]]:
    """What there is on a blocking socket, and the descriptors, close-on-exec, that came with it; b"" at its end. Raises `OSError`."""
    end = _socket.socket(fileno=fd)
    try:
        data, rights, _, _ = end.recvmsg(most_bytes, _socket.CMSG_SPACE(4 * _MOST_FDS), _socket.MSG_CMSG_CLOEXEC)
    finally:
        end.detach()
    return data, [number for _, _, packed in rights for number in memoryview(packed).cast("i")]


def accept(listener: int) -> int:
    """The next connection's descriptor, close-on-exec. Raises `BlockingIOError` when there is none."""
    wrapped = _socket.socket(fileno=listener)
    try:
        fd, _ = wrapped._accept()  # type: ignore[attr-defined]  # what socket.accept itself calls
    finally:
        wrapped.detach()
    os.set_inheritable(fd, False)
    made: int = fd
    return made


def connect(directory: str, name: str, *, blocking: bool = True) -> int:
    """Connect to `directory/name`. Raises `FileNotFoundError` or `ConnectionRefusedError` when nobody listens.

    Without `blocking`, the descriptor does not block either, and a full queue of connections raises `BlockingIOError`.
    """
    where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    made = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    made.setblocking(blocking)
    try:
        made.connect(_short(where, name))
    except BaseException:
        made.close()
        raise
    finally:
        os.close(where)
    return made.detach()
