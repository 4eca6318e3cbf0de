"""--network, --publish and what belongs to them, as data; and what is refused."""

from __future__ import annotations

import pytest

from nagaya.cli.network_flags import parse_networks, parse_publish, parse_rate
from nagaya.errors import UsageError
from nagaya.manager.network_options import check_network_options
from nagaya.manager.options import CreateOptions
from nagaya.model.spec import Attachment, PortMapping


@pytest.mark.parametrize(
    ("texts", "mode", "attachments"),
    [
        (["bridge"], "bridge", []),
        (["default"], "bridge", []),
        (["none", "host"], "host", []),
        (["front", "none"], "none", []),
        (["none", "front", "bridge"], "bridge", [Attachment("front"), Attachment("nagaya0")]),
        (
            ["front:ip=10.0.0.2,ip6=fd00::2,mac=02-00-00-00-00-0A,alias=a,alias=b"],
            "bridge",
            [Attachment("front", ("a", "b"), "10.0.0.2", "fd00::2", "02:00:00:00:00:0a")],
        ),
    ],
)
def test_networks(texts: list[str], mode: str, attachments: list[Attachment]) -> None:
    assert parse_networks(texts) == (mode, attachments)


@pytest.mark.parametrize("text", ["none:ip=1.2.3.4", "front:ip", "front:ip=", "front:color=red", "front:x=1,ip=2"])
def test_wrong_networks(text: str) -> None:
    with pytest.raises(UsageError):
        parse_networks([text])


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("80", [PortMapping("", 0, 80)]),
        ("8080:80", [PortMapping("", 8080, 80)]),
        ("0.0.0.0:53:53/udp", [PortMapping("0.0.0.0", 53, 53, "udp")]),
        ("127.0.0.1::80", [PortMapping("127.0.0.1", 0, 80)]),
        ("[::1]:8080:80/TCP", [PortMapping("::1", 8080, 80)]),
        ("8000-8001:80-81", [PortMapping("", 8000, 80), PortMapping("", 8001, 81)]),
    ],
)
def test_ports(text: str, ports: list[PortMapping]) -> None:
    assert parse_publish(text) == ports


@pytest.mark.parametrize(
    "text", ["", ":", "80:", "a:80", "0", "65536", "80-79", "1-3:1-2", "[::1:80", "[::1]80", "1:2:3:4", "1-2000"]
)
def test_wrong_ports(text: str) -> None:
    with pytest.raises(UsageError, match="--publish"):
        parse_publish(text)


def test_rates() -> None:
    assert [parse_rate(text) for text in ("0", "10mbit", "1.5g", "512K", "8000")] == [
        0,
        10**7,
        15 * 10**8,
        512_000,
        8000,
    ]
    for text in ("", "fast", "-1m", "1x", "1e400"):
        with pytest.raises(UsageError):
            parse_rate(text)


PLAIN = CreateOptions("busybox")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (PLAIN._replace(network="host", attachments=(Attachment("a"),)), "cannot be on others"),
        (PLAIN._replace(network="none", ports=(PortMapping("", 1, 1),)), "no meaning with --network none"),
        (PLAIN._replace(network="none", allow_host=True), "--allow-host has no meaning"),
        (PLAIN._replace(attachments=(Attachment("a"), Attachment("a"))), "given twice"),
        (PLAIN._replace(attachments=tuple(Attachment(f"n{at}") for at in range(17))), "16 networks at most"),
        (PLAIN._replace(attachments=(Attachment("a/b"),)), "not the name of a network"),
        (PLAIN._replace(attachments=(Attachment("a", ("-x",)),)), "no name for a machine"),
        (PLAIN._replace(attachments=(Attachment("a", ("x" * 64,)),)), "no name for a machine"),
        (PLAIN._replace(attachments=(Attachment("a", address="fd00::1"),)), "not an IPv4 address"),
        (PLAIN._replace(attachments=(Attachment("a", address6="10.0.0.1"),)), "not an IPv6 address"),
        (PLAIN._replace(attachments=(Attachment("a", mac="02:00:00:00:00"),)), "not a MAC address"),
        (PLAIN._replace(attachments=(Attachment("a", mac="03:00:00:00:00:01"),)), "a group's"),
        (PLAIN._replace(ports=(PortMapping("", 1, 1, "sctp"),)), "unknown protocol"),
        (PLAIN._replace(ports=(PortMapping("nowhere", 1, 1),)), "not an IP"),
        (PLAIN._replace(ports=(PortMapping("", 1, 1),) * 2), "twice"),
        (PLAIN._replace(net_rate_bits=10), "8kbit"),
    ],
)
def test_what_no_machine_can_have(options: CreateOptions, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_network_options(options)
