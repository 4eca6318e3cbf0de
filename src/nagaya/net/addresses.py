"""Which machine has which address: a store of leases that survives `kill -9`.

A lease is a symbolic link ADDRESS -> MACHINE ID: making it is atomic and refuses a second claim. A machine's search
begins at a place that its id decides, so it finds its own lease again without an index.
"""

from __future__ import annotations

import os

from nagaya.errors import Conflict
from nagaya.static import NamedTuple
from nagaya.storage.paths import make_directory

FIRST_SUBNETS = tuple(range(87, 128))  # 10.87.0.0/16 … 10.127.0.0/16


class Subnet(NamedTuple):
    """An IPv4 /16 and its gateway, which is its first address."""

    second: int  # 10.SECOND.0.0/16

    @property
    def gateway(self) -> str:
        return f"10.{self.second}.0.1"

    @property
    def text(self) -> str:
        return f"10.{self.second}.0.0/16"

    @property
    def prefix(self) -> int:
        return 16

    def address(self, number: int) -> str:
        return f"10.{self.second}.{number >> 8}.{number & 255}"


USABLE = 65534 - 1  # numbers 2 … 65534: without network, gateway and broadcast


def used_subnets(route_table: str) -> set[int]:
    """Second bytes of the 10.x networks in /proc/net/route's text. A route that covers all of 10/8 takes none."""
    used: set[int] = set()
    for line in route_table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            continue
        destination = int.from_bytes(bytes.fromhex(fields[1])[::-1], "big")
        mask = int.from_bytes(bytes.fromhex(fields[7])[::-1], "big")
        if destination >> 24 == 10 and mask >> 16 & 255:
            used.update(second for second in range(256) if _overlaps(second, destination, mask))
    return used


def _overlaps(second: int, destination: int, mask: int) -> bool:
    subnet = 10 << 24 | second << 16
    return subnet & mask == destination or destination & 0xFFFF0000 == subnet


def drop_taken_subnet(directory: str, routes: str) -> bool:
    """Forget a subnet that somebody else has come to use while our bridge was down; whether it was so.

    For the holder of the network's lock, while there is no bridge. `routes` is /proc/net/route's text. A subnet in
    which machines have addresses is kept, whatever the host says.
    """
    path = f"{directory}/subnet"
    try:
        second = int(os.readlink(path))
    except (OSError, ValueError):
        return False
    if second not in used_subnets(routes) or holders(directory):
        return False
    os.unlink(path)
    return True


def read_routes() -> str:
    """The host's IPv4 routes, as the kernel prints them."""
    with open("/proc/net/route", encoding="ascii") as file:
        return file.read()


def load_subnet(directory: str) -> Subnet:
    """The network's subnet: chosen clear of the host's routes the first time, and kept."""
    path = f"{directory}/subnet"
    try:
        text = os.readlink(path)
    except FileNotFoundError:
        used = used_subnets(read_routes())
        free = [second for second in FIRST_SUBNETS if second not in used]
        if not free:
            raise Conflict(
                "no free subnet was found among 10.87.0.0/16 to 10.127.0.0/16", hint="use --network host or none"
            ) from None
        make_directory(directory)
        try:
            os.symlink(str(free[0]), path)
        except FileExistsError:
            return load_subnet(directory)
        text = str(free[0])
    return Subnet(int(text) if text.isdigit() and int(text) < 256 else FIRST_SUBNETS[0])


def _start(machine_id: str) -> int:
    return int(machine_id[:8], 16) % USABLE


def claim(directory: str, subnet: Subnet, machine_id: str) -> str:
    """The machine's address: the one it has, or a free one."""
    leases = f"{directory}/leases"
    start = _start(machine_id)
    for step in range(USABLE):
        address = subnet.address(2 + (start + step) % USABLE)
        link = f"{leases}/{address}"
        try:
            os.symlink(machine_id, link)
            return address
        except FileNotFoundError:
            make_directory(leases)
            return claim(directory, subnet, machine_id)
        except FileExistsError:
            if _owner(link) == machine_id:
                return address
    raise Conflict(f"all addresses of {subnet.text} are taken", hint="remove machines that are not needed")


def _owner(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def release(directory: str, machine_id: str) -> None:
    """Give the machine's address back, if it has one."""
    leases = f"{directory}/leases"
    subnet = load_subnet(directory)
    start = _start(machine_id)
    for step in range(16):
        link = f"{leases}/{subnet.address(2 + (start + step) % USABLE)}"
        if _owner(link) == machine_id:
            os.unlink(link)
            return
    for name in _list(leases):  # a crowded neighbourhood: it lies further on
        if _owner(f"{leases}/{name}") == machine_id:
            os.unlink(f"{leases}/{name}")
            return


def holders(directory: str) -> set[str]:
    """Ids of the machines that hold an address."""
    leases = f"{directory}/leases"
    return {_owner(f"{leases}/{name}") for name in _list(leases)} - {""}


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
