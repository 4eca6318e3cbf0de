"""Two stores of this host, each in a network namespace of its own, and a socket between them: for machines that move."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import remove_all
from tests.e2e.command import Cli
from tests.e2e.test_lifecycle import wait_for

NETWORK, SUBNET = "house", "172.31.77"


class Two:
    """Two stores, each in a network namespace of its own, and a socket between them."""

    def __init__(self, here: Cli, there: Cli, socket: str, spaces: tuple[str, str]) -> None:
        self.here, self.there, self.socket, self.spaces = here, there, socket, spaces
        self.to = f"unix:{socket}"

    def listen(self, *flags: str, to: Cli | None = None) -> subprocess.Popen[bytes]:
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        receiver = (to or self.there).popen("migrate", "receive", *flags, self.to)
        wait_for(lambda: os.path.exists(self.socket))
        return receiver

    def states(self, name: str) -> list[str]:
        """What the machine is on each side; "" = it is not there."""
        return [
            next((one["state"] for one in side.machines() if one["name"] == name), "")
            for side in (self.here, self.there)
        ]


@contextmanager
def open_two(place: Path, images: str) -> Iterator[Two]:
    """With the images of the directory `images` in both, and a network of the same name and addresses."""
    spaces = f"ngymig{os.getpid()}a", f"ngymig{os.getpid()}b"
    sides = []
    try:
        for space in spaces:
            subprocess.run(["ip", "netns", "add", space], check=True)
            subprocess.run(["ip", "-n", space, "link", "set", "lo", "up"], check=True)
            root = place / space
            root.mkdir()
            subprocess.run(["cp", "-a", images, str(root)], check=True)
            side = Cli(str(root), prefix=("nsenter", f"--net=/run/netns/{space}"))
            side.ok("network", "create", "--subnet", f"{SUBNET}.0/24", "--subnet", "fd6e:77::/64", NETWORK)
            sides.append(side)
        yield Two(sides[0], sides[1], str(place / "s"), spaces)
        for side in sides:
            remove_all(side)
            side.ok("network", "rm", NETWORK)
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)
