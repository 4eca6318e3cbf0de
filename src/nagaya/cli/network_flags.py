"""`--network`, `--ip`, `--publish` and what belongs to them: from flags to the model's data."""

from __future__ import annotations

from nagaya.cli.flags import Parsed
from nagaya.errors import UsageError
from nagaya.model.spec import DEFAULT_NETWORK, Attachment, PortMapping
from nagaya.static import NamedTuple

MODES = ("bridge", "host", "none", "user")
MOST_RANGE = 1024
_RATES = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class NetworkOptions(NamedTuple):
    """The part of `CreateOptions` that is about networks."""

    network: str
    attachments: tuple[Attachment, ...]
    ports: tuple[PortMapping, ...]
    net_rate_bits: int
    allow_host: bool


def read(parsed: Parsed, networks: list[str]) -> NetworkOptions:
    """`networks` are the values of --network, or what is settled. Raises `UsageError`."""
    mode, attachments = parse_networks(networks)
    first = Attachment(
        "",
        address=parsed.text("ip"),
        address6=parsed.text("ip6"),
        mac=parsed.text("mac-address").lower().replace("-", ":"),
    )
    aliases = tuple(parsed.texts("network-alias"))
    if first != Attachment("") or aliases:
        if mode != "bridge":
            raise UsageError(
                f"an address or an alias has no meaning with --network {mode}", hint="use --network bridge"
            )
        attachments = attachments or [Attachment(DEFAULT_NETWORK)]
        attachments[0] = _merge(attachments[0], first)
        attachments = [one._replace(aliases=(*one.aliases, *aliases)) for one in attachments]
    return NetworkOptions(
        network=mode,
        attachments=tuple(attachments),
        ports=tuple(port for text in parsed.texts("publish") for port in parse_publish(text)),
        net_rate_bits=parse_rate(parsed.text("net-rate", "0")),
        allow_host=parsed.switch("allow-host"),
    )


def read_attachment(parsed: Parsed) -> Attachment:
    """What `network connect` asks of the network; its name is left empty."""
    return Attachment(
        "", aliases=tuple(parsed.texts("alias")), address=parsed.text("ip"), address6=parsed.text("ip6"),
        mac=parsed.text("mac-address").lower().replace("-", ":"),
    )  # fmt: skip


def _merge(one: Attachment, first: Attachment) -> Attachment:
    for name in ("address", "address6", "mac"):
        given = getattr(first, name)
        if given and getattr(one, name) not in ("", given):
            raise UsageError(f"two values were given for the {name} in the network '{one.network}'")
        if given:
            one = one._replace(**{name: given})
    return one


def parse_networks(texts: list[str]) -> tuple[str, list[Attachment]]:
    """The mode and the attachments of --network values: a mode, or NAME[:ip=…,ip6=…,mac=…,alias=…].

    As with every flag, the last one wins where two cannot both be: "none", "host" and "user" go with nothing else.
    """
    mode, attachments = "bridge", list[Attachment]()
    for text in texts:
        name, colon, rest = text.partition(":")
        if name in MODES and name != "bridge":
            if colon:
                raise UsageError(f"--network {name} takes no options", hint=f"leave it at --network {name}")
            mode, attachments = name, []
        else:
            name = DEFAULT_NETWORK if name in ("bridge", "default") else name
            mode, attachments = "bridge", [*attachments, _parse_attachment(name, rest, text)]
    return mode, [] if attachments == [Attachment(DEFAULT_NETWORK)] else attachments


def _parse_attachment(name: str, rest: str, text: str) -> Attachment:
    attachment = Attachment(name)
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or not value or key not in ("ip", "ip6", "mac", "alias"):
            raise UsageError(
                f"--network: '{part}' in '{text}' is none of ip=, ip6=, mac=, alias=",
                hint="for example --network front:ip=10.64.0.9,alias=db",
            )
        if key == "alias":
            attachment = attachment._replace(aliases=(*attachment.aliases, value))
        elif key == "mac":
            attachment = attachment._replace(mac=value.lower().replace("-", ":"))
        else:
            attachment = attachment._replace(address=value) if key == "ip" else attachment._replace(address6=value)
    return attachment


def parse_publish(text: str) -> list[PortMapping]:
    """-p: [ADDRESS:][HOST[-LAST]:]GUEST[-LAST][/tcp|udp]. An IPv6 address stands in brackets."""
    hint = "for example -p 8080:80, -p 127.0.0.1:5353:53/udp, -p [::1]:8000-8010:8000-8010"
    rest, _, protocol = text.partition("/")
    address = ""
    if rest.startswith("["):
        address, bracket, rest = rest[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise UsageError(f"--publish: '{text}' is not [ADDRESS:][HOST:]GUEST[/PROTOCOL]", hint=hint)
        rest = rest[1:]
        parts = rest.split(":")
    else:
        parts = rest.split(":")
        if len(parts) == 3:
            address, parts = parts[0], parts[1:]
    if len(parts) > 2 or not parts[-1]:
        raise UsageError(f"--publish: '{text}' is not [ADDRESS:][HOST:]GUEST[/PROTOCOL]", hint=hint)
    guests = _parse_range(parts[-1], text, hint)
    hosts = _parse_range(parts[0], text, hint) if len(parts) == 2 and parts[0] else range(0)
    if hosts and len(hosts) != len(guests):
        raise UsageError(
            f"--publish: '{text}' has {len(hosts)} ports of the host for {len(guests)} of the machine", hint=hint
        )
    pairs = zip(hosts, guests, strict=True) if hosts else ((0, guest) for guest in guests)
    return [PortMapping(address, host, guest, protocol.lower() or "tcp") for host, guest in pairs]


def _parse_range(text: str, whole: str, hint: str) -> range:
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 65535 for part in (first, last)):
        raise UsageError(f"--publish: '{text}' in '{whole}' is not a port from 1 to 65535", hint=hint)
    found = range(int(first), int(last) + 1)
    if not 0 < len(found) <= MOST_RANGE:
        raise UsageError(f"--publish: '{text}' in '{whole}' is not a range of at most {MOST_RANGE} ports", hint=hint)
    return found


def parse_rate(text: str) -> int:
    """Bits per second of "10mbit", "1gbit", "512k"; 0 for no limit."""
    number = text.lower().rstrip("bitkmg")
    unit = text.lower()[len(number) :]
    try:
        bits = int(float(number) * _RATES[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"--net-rate: '{text}' is not a rate", hint="for example 10mbit, 512kbit or 1gbit") from None
    if bits < 0:
        raise UsageError(f"--net-rate: '{text}' is negative", hint="for example 10mbit")
    return bits
