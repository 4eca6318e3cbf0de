"""What may be asked of a machine's networks, where it says more than which one."""

from __future__ import annotations

import os

from nagaya.errors import UsageError
from nagaya.manager.options import CreateOptions
from nagaya.model.spec import Attachment, PortMapping
from nagaya.net import networks
from nagaya.net.planning import MOST_LINKS
from nagaya.net.subnets import parse_address

PROTOCOLS = ("tcp", "udp")
MOST_PORTS = 1024


def check_network_options(options: CreateOptions) -> None:
    """Raise `UsageError` for what no machine can have. Whether the networks are there is not asked."""
    if options.network != "bridge" and options.attachments:
        raise UsageError(
            f"a machine on the network '{options.network}' cannot be on others too",
            hint=f"leave --network {options.network} away, or the others",
        )
    asks = options.ports or options.publish_all or options.net_rate_bits or options.allow_host
    if options.network in ("none", "host") and asks:
        asked = (
            "--publish"
            if options.ports or options.publish_all
            else "--net-rate"
            if options.net_rate_bits
            else "--allow-host"
        )
        raise UsageError(f"{asked} has no meaning with --network {options.network}", hint="use --network bridge")
    if options.net_rate_bits and (options.network == "user" or os.geteuid()):
        raise UsageError("--net-rate has no meaning in a user-mode network", hint="root's machines have bridges")
    if len(options.attachments) > MOST_LINKS:
        raise UsageError(f"a machine can be on {MOST_LINKS} networks at most")
    seen: set[str] = set()
    for attachment in options.attachments:
        if attachment.network in seen:
            raise UsageError(f"the network '{attachment.network}' was given twice")
        seen.add(attachment.network)
        check_attachment(attachment)
    if len(options.ports) > MOST_PORTS:
        raise UsageError(f"a machine can publish {MOST_PORTS} ports at most")
    if len(set(options.ports)) != len(options.ports):
        raise UsageError("a port was published twice in the same way")
    for port in options.ports:
        check_port(port)
    _check_twice(options.ports)
    if options.net_rate_bits and options.net_rate_bits < 8000:
        raise UsageError("--net-rate: the least is 8kbit", hint="for example --net-rate 10mbit")


def check_attachment(attachment: Attachment) -> None:
    """Raise `UsageError` for names and addresses that nothing can have."""
    if not networks.is_name(attachment.network):
        raise UsageError(
            f"'{attachment.network}' is not the name of a network",
            hint="letters, digits, '-', '_' and '.', at most 63; or one of: bridge, host, none, user",
        )
    for alias in attachment.aliases:
        check_alias(alias)
    for text, version in ((attachment.address, 4), (attachment.address6, 6)):
        try:
            if text:
                parse_address(text, version)
        except ValueError as error:
            raise UsageError(str(error), hint="for example --ip 10.87.1.2 or --ip6 fd00::12") from None
    if attachment.mac:
        check_mac(attachment.mac)


def check_alias(name: str) -> None:
    """A host name as DNS has it (RFC 1123, 2.1), also with underscores, which compose files are full of."""
    labels = name.lower().split(".")
    if len(name) > 253 or not all(
        0 < len(label) < 64
        and label.isascii()
        and label.replace("-", "").replace("_", "").isalnum()
        and label[0] != "-"
        and label[-1] != "-"
        for label in labels
    ):
        raise UsageError(f"'{name}' is no name for a machine on a network", hint="for example --network-alias db")


def check_mac(text: str) -> None:
    """Six bytes of one machine's (not a group's) address, as 02:00:00:00:00:01."""
    parts = text.split(":")
    digits = set("0123456789abcdef")
    if len(parts) != 6 or not all(len(part) == 2 and digits.issuperset(part) for part in parts):
        raise UsageError(f"'{text}' is not a MAC address", hint="for example 02:00:00:00:00:01")
    if int(parts[0], 16) & 1 or text == "00:00:00:00:00:00":
        raise UsageError(f"the MAC address {text} is a group's, or nobody's", hint="for example 02:00:00:00:00:01")


def _check_twice(ports: tuple[PortMapping, ...]) -> None:
    """A port of the host leads to one port of the machine."""
    seen: dict[tuple[str, int, str], PortMapping] = {}
    for port in ports:
        if not port.host_port:
            continue
        other = seen.setdefault((port.host_address, port.host_port, port.protocol), port)
        if other is not port:
            raise UsageError(
                f"--publish: port {port.host_port}/{port.protocol} is to lead to {other.guest_port} and to "
                f"{port.guest_port}",
                hint=f"for example -p {other.host_port}:{other.guest_port} -p {port.host_port + 1}:{port.guest_port}",
            )


def check_port(port: PortMapping) -> None:
    if port.protocol not in PROTOCOLS:
        raise UsageError(f"--publish: unknown protocol '{port.protocol}'", hint=f"one of: {', '.join(PROTOCOLS)}")
    if not 0 <= port.host_port <= 65535 or not 1 <= port.guest_port <= 65535:
        raise UsageError("--publish: a port is a number from 1 to 65535", hint="for example -p 8080:80")
    if port.host_address:
        try:
            parse_address(port.host_address)
        except ValueError as error:
            raise UsageError(f"--publish: {error}", hint="for example -p 0.0.0.0:8080:80 or -p [::]:8080:80") from None
