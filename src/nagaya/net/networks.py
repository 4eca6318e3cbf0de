"""Networks on disk: their records and where what belongs to them lies. Who may do what, and when, is the manager's to say.

ROOT/network/NAME/network.json      NetworkRecord
ROOT/network/NAME/leases/ADDRESS    symbolic link to a machine's id (net/addresses.py)
"""

from __future__ import annotations

import os
import zlib

from nagaya.errors import IntegrityError, NotFound
from nagaya.model.spec import DEFAULT_NETWORK
from nagaya.net import subnets
from nagaya.static import NamedTuple
from nagaya.storage import records
from nagaya.storage.paths import make_directory

DEFAULT_ROOT = "/var/lib/nagaya"
DRIVERS = ("bridge", "macvlan")


class NetworkRecord(NamedTuple):
    """What a network is. Subnets as text ("10.87.0.0/16"), "" = none of that family."""

    name: str
    id: str  # 32 hex digits
    driver: str  # "bridge" | "macvlan"
    created_ns: int
    subnet: str = ""
    gateway: str = ""  # of a macvlan network: the local network's router
    subnet6: str = ""
    gateway6: str = ""
    is_chosen: bool = False  # the IPv4 subnet was chosen by us, and may be chosen again while nobody is there
    internal: bool = False  # no way out
    mtu: int = 0  # 0 = as the link has that leads out
    parent: str = ""  # macvlan: link of the host
    labels: tuple[tuple[str, str], ...] = ()


def directory(root: str, name: str) -> str:
    return f"{root}/network/{name}"


def leases(root: str, name: str) -> str:
    return f"{root}/network/{name}/leases"


def bridge_name(root: str, name: str = DEFAULT_NETWORK) -> str:
    """The host's bridge for a network: "nagaya0" for the default one of the default store, so that stores never meet."""
    if name == DEFAULT_NETWORK:
        return DEFAULT_NETWORK if root == DEFAULT_ROOT else f"nagaya-{zlib.crc32(os.fsencode(root)):08x}"
    return f"nagaya-{zlib.crc32(os.fsencode(root) + b'/' + os.fsencode(name)):08x}"


def bridge_mac(bridge: str) -> str:
    """A MAC address that stays: "0e" is locally administered, and no machine's begins so."""
    digest = zlib.crc32(os.fsencode(bridge))
    return "0e:4e:" + ":".join(f"{digest >> shift & 255:02x}" for shift in (24, 16, 8, 0))


def names(root: str) -> list[str]:
    """Names of all networks that have a record; the default one is there even before it has."""
    try:
        found = os.listdir(f"{root}/network")
    except FileNotFoundError:
        found = []
    return sorted({DEFAULT_NETWORK, *(name for name in found if os.path.exists(f"{root}/network/{name}/network.json"))})


def load(root: str, name: str) -> NetworkRecord:
    """Raises `NotFound`; `IntegrityError` for a record that no network of ours has."""
    if not is_name(name):
        raise _missing(name)
    try:
        record = records.load(f"{directory(root, name)}/network.json", NetworkRecord)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(name) from None
    check(record, name)
    return record


def _missing(name: str) -> NotFound:
    if name == DEFAULT_NETWORK:
        return NotFound("the default network has not been used yet", hint="the first machine that is started makes it")
    return NotFound(
        f"there is no network '{name}'", hint=f"'nagaya network ls' lists them; nagaya network create {name} makes it"
    )


def store(root: str, record: NetworkRecord) -> None:
    make_directory(directory(root, record.name))
    records.store(f"{directory(root, record.name)}/network.json", record, durable=True)


def is_name(name: str) -> bool:
    """Letters, digits, '-', '_' and '.', at most 63, the first a letter or digit."""
    plain = name.translate({ord("-"): "a", ord("_"): "a", ord("."): "a"})
    return 0 < len(name) < 64 and plain.isascii() and plain.isalnum() and name[0].isalnum()


def check(record: NetworkRecord, name: str) -> None:
    """Raise `IntegrityError` for a record that could lead a command astray."""
    where = f"the record of network '{name}'"
    if record.name != name or record.driver not in DRIVERS or len(record.id) != 32:
        raise IntegrityError(f"{where} is damaged", hint=f"remove it with 'nagaya network rm -f {name}'")
    for network, gateway in ((record.subnet, record.gateway), (record.subnet6, record.gateway6)):
        try:
            if network:
                subnet = subnets.parse_subnet(network)
                if subnet.prefix > subnet.bits - 2 or (gateway and not subnet.holds(gateway)):
                    raise ValueError
        except ValueError:
            raise IntegrityError(
                f"{where} is damaged: no subnet {network}", hint=f"remove it with 'nagaya network rm -f {name}'"
            ) from None
    if not 0 <= record.mtu <= 65535 or any(letter in record.parent for letter in '/"\0'):
        raise IntegrityError(f"{where} is damaged", hint=f"remove it with 'nagaya network rm -f {name}'")
