"""Which machine has which address: a store of leases that survives `kill -9`.

A lease is a symbolic link ADDRESS -> MACHINE ID: making it is atomic and refuses a second claim. A machine's search
begins at a place that its id decides, so it finds its own lease again without an index.
"""

from __future__ import annotations

import os

from nagaya.errors import Conflict, UsageError
from nagaya.net.subnets import Subnet
from nagaya.storage.paths import make_directory

MOST_TRIED = 1 << 16


def _start(machine_id: str, usable: int) -> int:
    return int(machine_id[:8], 16) % usable


def claim(leases: str, subnet: Subnet, machine_id: str, *, gateway: str, wanted: str = "") -> str:
    """The machine's address in the network whose leases lie in `leases`: `wanted`, the one it has, or a free one.

    Raises `Conflict` when it is taken, or all are.
    """
    make_directory(leases)
    if wanted:
        return _claim_wanted(leases, subnet, machine_id, gateway=gateway, wanted=wanted)
    # Number 0 is the network's, in IPv4 the last one its broadcast's.
    usable = min(subnet.size, MOST_TRIED) - (3 if subnet.version == 4 else 2)
    start = _start(machine_id, max(usable, 1))
    for step in range(usable + 1):
        address = subnet.address(1 + (start + step) % (usable + 1))
        if address != gateway and _take(f"{leases}/{address}", machine_id):
            return address
    raise Conflict(f"all addresses of {subnet.text} are taken", hint="remove machines that are not needed")


def _claim_wanted(leases: str, subnet: Subnet, machine_id: str, *, gateway: str, wanted: str) -> str:
    wanted = check_wanted(subnet, wanted, gateway=gateway)
    if _take(f"{leases}/{wanted}", machine_id):
        return wanted
    raise Conflict(
        f"the address {wanted} is in use by machine {_owner(f'{leases}/{wanted}')[:12]}",
        hint="give another one, or none: then Nagaya chooses",
        state=wanted,
    )


def check_wanted(subnet: Subnet, wanted: str, *, gateway: str) -> str:
    """The address as the kernel writes it. Raises `UsageError` for one that no machine of the network can have."""
    from nagaya.net.subnets import format_address, parse_address

    try:
        number = parse_address(wanted, subnet.version) - subnet.base
    except ValueError as error:
        raise UsageError(str(error), hint=f"for example {subnet.address(9)}") from None
    last = subnet.size - 1 if subnet.version == 4 else subnet.size
    text = format_address(number + subnet.base, subnet.version)
    if not 0 < number < last or text == gateway:
        raise UsageError(
            f"{wanted} is no address for a machine in {subnet.text}", hint=f"for example {subnet.address(9)}"
        )
    return text


def _take(link: str, machine_id: str) -> bool:
    """Whether the lease is the machine's now."""
    try:
        os.symlink(machine_id, link)
    except FileExistsError:
        return _owner(link) == machine_id
    return True


def _owner(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def release(leases: str, machine_id: str) -> None:
    """Give the machine's addresses back, if it has any."""
    for address, owner in list_leases(leases):
        if owner == machine_id:
            _drop(f"{leases}/{address}")


def release_addresses(leases: str, machine_id: str, addresses: tuple[str, ...]) -> None:
    """The same where it is known which: a crowded network is not searched."""
    for address in addresses:
        if address and _owner(f"{leases}/{address}") == machine_id:
            _drop(f"{leases}/{address}")


def _drop(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def list_leases(leases: str) -> list[tuple[str, str]]:
    """(address, machine id) of all."""
    try:
        found = os.listdir(leases)
    except FileNotFoundError:
        return []
    return [(address, owner) for address in found if (owner := _owner(f"{leases}/{address}"))]


def holders(leases: str) -> set[str]:
    """Ids of the machines that hold an address."""
    return {owner for _, owner in list_leases(leases)}


def has_holders(leases: str) -> bool:
    try:
        with os.scandir(leases) as entries:
            return any(True for _ in entries)
    except FileNotFoundError:
        return False
