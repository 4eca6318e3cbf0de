"""virtio-fs with the real daemon: a file of the host read through the rings, and what its death does."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.errors import GuestFault
from nagaya.virtio.fs import FileSystem
from nagaya.virtio.vhost_user import VhostUser
from tests.virtio_rig import Rig

PLACES = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
REQUESTS = 1
LOOKUP, OPEN, READ, INIT = 1, 14, 15, 26
IN_HEADER = struct.Struct("<IIQQIIII")  # linux/fuse.h: struct fuse_in_header
OUT_HEADER = struct.Struct("<IiQ")  # struct fuse_out_header


def find_daemon() -> str:
    for place in (*PLACES, shutil.which("virtiofsd")):
        if place and os.path.exists(place):
            return place
    pytest.skip("needs virtiofsd")


class Shared:
    """A directory, its daemon, and a driver that speaks FUSE."""

    def __init__(self, directory: Path) -> None:
        program = find_daemon()
        if os.geteuid():
            pytest.skip("needs root")
        path = str(directory / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        shared = directory / "shared"
        shared.mkdir()
        (shared / "greeting").write_bytes(b"hello from the host\n" * 500)
        self.daemon = subprocess.Popen(
            [program, f"--fd={listener.fileno()}", "-o", f"source={shared}", "-o", "sandbox=chroot", "-f"],
            pass_fds=[listener.fileno()],
            stderr=(directory / "log").open("wb"),
        )
        front = socket.socket(socket.AF_UNIX)
        front.connect(path)
        listener.close()
        user = VhostUser(front.detach())
        user.greet()
        self.device = FileSystem("fs0", user, tag="shared")
        self.rig = Rig(self.device).start()
        self._unique = 0

    def ask(self, operation: int, node: int, body: bytes, *, reply_bytes: int = 256) -> tuple[int, bytes]:
        """One FUSE request: its error number and its answer."""
        self._unique += 1
        header = IN_HEADER.pack(IN_HEADER.size + len(body), operation, self._unique, node, 0, 0, 0, 0)
        self.rig.add(REQUESTS, header, body, room=(OUT_HEADER.size, reply_bytes))
        (answer,) = self.rig.taken_data(REQUESTS, count=1)
        size, error, unique = OUT_HEADER.unpack(answer[: OUT_HEADER.size])
        assert (size, unique) == (len(answer), self._unique)
        return -error, answer[OUT_HEADER.size :]

    def read_greeting(self) -> bytes:
        error, answer = self.ask(INIT, 0, struct.pack("<IIII", 7, 31, 1 << 17, 0))
        assert (error, *struct.unpack("<II", answer[:8])) == (0, 7, 36) or answer[0] == 7
        assert self.ask(LOOKUP, 1, b"nothing\0")[0] == 2
        error, entry = self.ask(LOOKUP, 1, b"greeting\0")
        assert error == 0
        (node,) = struct.unpack("<Q", entry[:8])
        error, opened = self.ask(OPEN, node, struct.pack("<II", os.O_RDONLY, 0))
        assert error == 0
        (handle,) = struct.unpack("<Q", opened[:8])
        error, data = self.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 65536, 0, 0, 0, 0), reply_bytes=65536)
        assert error == 0
        return data

    def close(self) -> None:
        self.rig.close()
        try:
            self.daemon.wait(5)  # it ends when its connection does
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
            raise


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    made = Shared(tmp_path)
    yield made
    made.close()


def test_a_file_of_the_host(shared: Shared) -> None:
    assert shared.read_greeting() == b"hello from the host\n" * 500
    counters = shared.device.counters()
    assert counters["kicks"] >= 5
    assert counters["interrupts"] >= 5


def test_again_after_a_reset(shared: Shared) -> None:
    shared.read_greeting()
    shared.rig.restart()
    assert shared.read_greeting()[:6] == b"hello "


def test_a_killed_daemon(shared: Shared) -> None:
    shared.read_greeting()
    shared.daemon.kill()
    shared.rig.until(lambda: bool(shared.rig.faults))
    with pytest.raises(GuestFault, match="its daemon ended"):
        shared.rig.kick(REQUESTS)
