"""All networks of a store: create, find, remove, and plug machines in and out."""

from __future__ import annotations

import os
import time

from nagaya.errors import Conflict, HostError, IntegrityError, NotFound, Unsupported, UsageError
from nagaya.kernel.netlink import Netlink
from nagaya.manager.network_options import check_attachment
from nagaya.model.spec import DEFAULT_NETWORK, Attachment, MachineSpec
from nagaya.net import attach, damage, dns, live, networks, planning, subnets
from nagaya.net.networks import NetworkRecord
from nagaya.net.subnets import Subnet
from nagaya.static import NamedTuple
from nagaya.storage import events, machines
from nagaya.storage.paths import Paths
from nagaya.storage.records import to_data

builtins_list = list  # `Networks.list` hides the type's name from annotations in its own class
TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.host import Host

RESERVED = ("bridge", "host", "none", "user", "default")
LEAST_MTU = 576
MOST_MTU = 65535


class NetworkOptions(NamedTuple):
    """What a new network is to be. Empty texts: as Nagaya chooses."""

    driver: str = "bridge"
    subnets: tuple[str, ...] = ()  # one of each family at most
    gateways: tuple[str, ...] = ()
    ipv6: bool = True
    internal: bool = False
    mtu: int = 0
    parent: str = ""
    labels: tuple[tuple[str, str], ...] = ()


class Member(NamedTuple):
    """A machine on a network, with what it has there now; without addresses it does not run."""

    machine: str
    id: str
    type: str
    link: str = ""
    mac: str = ""
    address: str = ""
    address6: str = ""
    names: tuple[str, ...] = ()


def check_attachments(paths: Paths, attachments: tuple[Attachment, ...]) -> None:
    """Raise for networks that are not there, and for addresses that they cannot give."""
    if os.geteuid():
        raise Unsupported(
            "a plain user's machine has a user-mode network, and cannot be on others",
            hint="leave --network and the addresses away, or run the command as root",
        )
    for attachment in attachments:
        if attachment.network != DEFAULT_NETWORK:
            attach.check_addresses(networks.load(paths.root, attachment.network), attachment)
        elif attachment.address or attachment.address6:
            attach.check_addresses(load_default(paths), attachment)


def load_default(paths: Paths) -> NetworkRecord:
    """The default network, made if no machine has needed it yet."""
    with planning.host_lock(), Netlink() as netlink:
        return planning.load_or_make(paths.root, DEFAULT_NETWORK, netlink=netlink)


class Networks:
    """The networks below one store."""

    def __init__(self, paths: Paths, host: Host) -> None:
        self._paths = paths
        self._host = host

    def mend(self) -> builtins_list[str]:
        """Make again what somebody damaged of the host's side of networks that are in use; a sentence for each."""
        return damage.mend(self._paths)

    def list(self) -> builtins_list[NetworkRecord]:
        """All that there are; the default one once it has been used. Damaged ones are in `damaged`."""
        found = []
        for name in networks.names(self._paths.root):
            try:
                found.append(networks.load(self._paths.root, name))
            except (NotFound, IntegrityError):
                continue
        return found

    def damaged(self) -> builtins_list[IntegrityError]:
        found = []
        for name in networks.names(self._paths.root):
            try:
                networks.load(self._paths.root, name)
            except NotFound:
                continue
            except IntegrityError as problem:
                found.append(problem)
        return found

    def get(self, name: str) -> NetworkRecord:
        """By name ("bridge" is the default network), id, or the beginning of an id. Raises `NotFound`."""
        if name in ("bridge", "default"):
            name = DEFAULT_NETWORK
        if os.path.exists(f"{networks.directory(self._paths.root, name)}/network.json") or not networks.is_name(name):
            return networks.load(self._paths.root, name)
        found = [record for record in self.list() if len(name) >= 4 and record.id.startswith(name)]
        if len(found) == 1:
            return found[0]
        return networks.load(self._paths.root, name)  # which says that there is none

    def create(self, name: str, options: NetworkOptions) -> NetworkRecord:
        """Make a network. Nothing is made on the host until a machine is started on it."""
        _require_root()
        if name in RESERVED or name == DEFAULT_NETWORK or not networks.is_name(name):
            raise UsageError(
                f"'{name}' cannot be a network's name", hint="letters, digits, '-', '_' and '.', for example front"
            )
        _check(options)
        with planning.host_lock(), Netlink() as netlink:
            if os.path.exists(f"{networks.directory(self._paths.root, name)}/network.json"):
                raise Conflict(f"there is a network '{name}' already", hint=f"nagaya network rm {name}")
            try:
                record = self._plan(name, options, netlink)
            except OSError as error:
                raise HostError.from_os(error, "cannot look at this host's network") from None
            networks.store(self._paths.root, record)
        self._record("create", record)
        return record

    def _plan(self, name: str, options: NetworkOptions, netlink: Netlink) -> NetworkRecord:
        if options.driver == "macvlan" and netlink.find_link(options.parent) is None:
            raise NotFound(f"this host has no link '{options.parent}'", hint="'ip link' lists them")
        reserved = self._subnets()
        subnet, subnet6 = _wanted(options.subnets, 4), _wanted(options.subnets, 6)
        if options.driver == "bridge":
            for wanted in filter(None, (subnet, subnet6)):
                _check_free(wanted, [*planning.taken_subnets(netlink), *reserved])
            if subnet is None and not (subnet6 is not None and options.subnets):
                subnet = planning.choose_subnet(subnets.further_candidates(), netlink=netlink, reserved=tuple(reserved))
            if subnet6 is None and options.ipv6:
                subnet6 = subnets.random_subnet6()
        return NetworkRecord(
            name=name, id=os.urandom(16).hex(), driver=options.driver, created_ns=time.time_ns(),
            subnet=subnet.text if subnet else "", gateway=_gateway(options, subnet),
            subnet6=subnet6.text if subnet6 else "", gateway6=_gateway(options, subnet6),
            is_chosen=options.driver == "bridge" and _wanted(options.subnets, 4) is None,
            internal=options.internal, mtu=options.mtu, parent=options.parent, labels=options.labels,
        )  # fmt: skip

    def _subnets(self) -> builtins_list[Subnet]:
        """Of networks whose bridges may be down."""
        return [
            subnets.parse_subnet(text)
            for record in self.list()
            if record.driver == "bridge"
            for text in (record.subnet, record.subnet6)
            if text
        ]

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a network. Raises `Conflict` while machines are on it; `force`: while none of them runs."""
        _require_root()
        try:
            record = self.get(name)
        except IntegrityError:
            if not force:
                raise
            record = NetworkRecord(name, "", "bridge", 0)
        except NotFound:
            if name not in (DEFAULT_NETWORK, "bridge", "default"):
                raise
            record = NetworkRecord(DEFAULT_NETWORK, "", "bridge", 0)
        if record.name == DEFAULT_NETWORK:
            raise Conflict(
                "the default network cannot be removed",
                hint="'nagaya network prune' takes it down while nobody uses it",
            )
        users = self.users(record.name)
        if users and not force:
            raise Conflict(
                f"network '{record.name}' is in use by machine {', '.join(spec.name for spec in users[:5])}",
                hint=f"nagaya network disconnect {record.name} {users[0].name}; with -f, machines that do not run may keep it",
            )
        if not attach.remove_network(self._paths, record.name):
            raise Conflict(f"network '{record.name}' is in use by machines that run", hint="stop them first")
        self._record("destroy", record)

    def prune(self) -> builtins_list[str]:
        """Remove every network that no machine is on; the default one's bridge too. Answers their names."""
        _require_root()
        self._host.machines.list()  # mends what was cut off
        removed = []
        for record in self.list():
            if record.name != DEFAULT_NETWORK and not self.users(record.name):
                try:
                    self.remove(record.name)
                except (Conflict, NotFound):
                    continue  # somebody uses it, or has removed it, by now
                removed.append(record.name)
        attach.remove_idle(self._paths)
        return removed

    def users(self, name: str) -> builtins_list[MachineSpec]:
        """The machines that are on a network, whether they run or not."""
        found = []
        for machine_id in machines.ids(self._paths):
            try:
                spec = machines.load_spec(self._paths, machine_id)
            except (FileNotFoundError, IntegrityError):
                continue
            if any(one.network == name for one in planning.attachments(spec)):
                found.append(spec)
        return sorted(found, key=lambda spec: spec.name)

    def members(self, name: str) -> builtins_list[Member]:
        """Who is where on a network."""
        found = []
        for spec in self.users(name):
            plan = live.load(self._paths, spec.id)
            link = next((one for one in plan.links if one.network == name), None) if plan is not None else None
            member = Member(spec.name, spec.id, spec.type)
            if link is not None:
                member = member._replace(
                    link=link.host_link, mac=link.mac, address=link.address, address6=link.address6, names=link.names
                )
            found.append(member)
        return found

    def inspect(self, name: str) -> dict[str, object]:
        """Everything about one, JSON-ready."""
        record = self.get(name)
        bridge = networks.bridge_name(self._paths.root, record.name) if record.driver == "bridge" else record.parent
        with Netlink() as netlink:
            link = netlink.find_link(bridge)
        return {
            **to_data(record),
            "labels": dict(record.labels),
            "bridge": bridge,
            "is_up": link is not None and link.is_up,
            "has_names": record.driver == "bridge" and dns.is_running(bridge),
            "machines": [to_data(member) for member in self.members(record.name)],
        }

    # -- machines in and out

    def connect(self, name: str, machine_name: str, attachment: Attachment) -> str:
        """Plug a machine into a network. Answers when that takes effect: "now" or what it waits for."""
        _require_root()
        record = load_default(self._paths) if name in ("bridge", "default", DEFAULT_NETWORK) else self.get(name)
        attachment = attachment._replace(network=record.name)
        check_attachment(attachment)
        attach.check_addresses(record, attachment)
        machine = self._host.machines.get(machine_name)
        with machine.lock():
            machine.reload()
            spec = machine.spec
            if spec.network not in ("bridge", "none"):
                raise Conflict(
                    f"machine '{spec.name}' was made with --network {spec.network}, and stays so",
                    hint="make it anew with --network bridge",
                )
            present = planning.attachments(spec)
            if any(one.network == record.name for one in present):
                raise Conflict(f"machine '{spec.name}' is on network '{record.name}' already")
            if len(present) == planning.MOST_LINKS:
                raise Conflict(f"machine '{spec.name}' is on {planning.MOST_LINKS} networks, which is the most")
            planned = spec._replace(network="bridge", attachments=(*present, attachment))
            when = machine.change(planned, "plug", record.name)
        self._record("connect", record, machine=spec.name)
        return when

    def disconnect(self, name: str, machine_name: str) -> str:
        """Take a machine off a network. Answers when that takes effect."""
        _require_root()
        machine = self._host.machines.get(machine_name)
        try:
            name = self.get(name).name
        except NotFound:
            pass  # removed with -f: the machine's record names it still
        with machine.lock():
            machine.reload()
            spec = machine.spec
            rest = tuple(one for one in planning.attachments(spec) if one.network != name)
            if len(rest) == len(planning.attachments(spec)):
                raise NotFound(
                    f"machine '{spec.name}' is not on network '{name}'", hint=f"nagaya network inspect {name}"
                )
            planned = spec._replace(attachments=rest, network="bridge" if rest else "none")
            when = machine.change(planned, "unplug", name)
        events.record(self._paths.events, "network", "disconnect", "", name, machine=spec.name)
        return when

    def _record(self, action: str, record: NetworkRecord, **attributes: str) -> None:
        events.record(self._paths.events, "network", action, record.id, record.name, **attributes)


def _require_root() -> None:
    if os.geteuid():
        raise Unsupported(
            "only root can make, change or remove networks", hint="a plain user's machines have networks of their own"
        )


def _check(options: NetworkOptions) -> None:
    if options.driver not in networks.DRIVERS:
        raise UsageError(f"unknown network driver '{options.driver}'", hint=f"one of: {', '.join(networks.DRIVERS)}")
    if options.mtu and not LEAST_MTU <= options.mtu <= MOST_MTU:
        raise UsageError(f"an MTU of {options.mtu} is not between {LEAST_MTU} and {MOST_MTU}", hint="--opt mtu=1400")
    if (options.driver == "macvlan") != bool(options.parent):
        raise UsageError(
            "a macvlan network, and no other, has a link of this host as its parent",
            hint="for example --driver macvlan --opt parent=eth0 --subnet 192.168.1.0/24",
        )
    if options.driver == "macvlan" and not options.subnets:
        raise UsageError("a macvlan network needs the subnet of the local network", hint="--subnet 192.168.1.0/24")
    for version in (4, 6):
        _wanted(options.subnets, version)
    for gateway in options.gateways:
        try:
            found = [
                one
                for text in options.subnets
                if (one := subnets.parse_subnet(text)).version == (6 if ":" in gateway else 4)
            ]
            if not found or not found[0].holds(gateway):
                raise ValueError
        except ValueError:
            raise UsageError(f"--gateway: {gateway} lies in no --subnet", hint="give both, or neither") from None


def _wanted(texts: tuple[str, ...], version: int) -> Subnet | None:
    found = []
    for text in texts:
        try:
            subnet = subnets.parse_subnet(text)
        except ValueError as error:
            raise UsageError(f"--subnet: {error}", hint="for example 172.30.0.0/24 or fd00:1:2:3::/64") from None
        if subnet.prefix > subnet.bits - 2:
            raise UsageError(f"--subnet: {text} has no room for machines", hint="for example 172.30.0.0/24")
        if subnet.version == version:
            found.append(subnet)
    if len(found) > 1:
        raise UsageError(f"--subnet: {found[1].text} is a second one of IPv{version}", hint="one of each family")
    return found[0] if found else None


def _check_free(wanted: Subnet, taken: list[Subnet]) -> None:
    for other in taken:
        if other.prefix > 8 and other.overlaps(wanted):
            raise Conflict(
                f"the subnet {wanted.text} overlaps {other.text}, which this host has a route to or another network uses",
                hint="choose another, or leave --subnet away",
            )


def _gateway(options: NetworkOptions, subnet: Subnet | None) -> str:
    """The one asked for, else the first address. (A macvlan network's is the local network's own router.)"""
    if subnet is None:
        return ""
    for gateway in options.gateways:
        if (":" in gateway) == (subnet.version == 6):
            return subnets.format_address(subnets.parse_address(gateway), subnet.version)
    return subnet.address(1)
