"""`nagaya port`."""

from __future__ import annotations

from nagaya.cli import listing
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Parsed
from nagaya.errors import NotFound, UsageError
from nagaya.model.spec import PortMapping
from nagaya.model.state import ALIVE


def port(context: Context, parsed: Parsed) -> int:
    """Show which ports of this host lead to a running machine, or to one of its ports."""
    machine = context.host.machines.get(parsed.words[0])
    wanted = _parse(parsed.words[1]) if len(parsed.words) > 1 else None
    state = machine.state
    found = state.ports if state.phase in ALIVE else ()
    if wanted is not None:
        found = tuple(one for one in found if (one.guest_port, one.protocol) == wanted)
        if not found:
            raise NotFound(
                f"port {wanted[0]}/{wanted[1]} of machine '{machine.name}' is not published",
                hint=f"'nagaya port {machine.name}' lists those that are; a stopped machine has none",
            )
    if parsed.switch("json"):
        listing.print_json([_record(one) for one in found])
        return 0
    for one in found:
        print(one.host_end if wanted is not None else f"{one.guest_port}/{one.protocol} -> {one.host_end}")
    return 0


def _parse(text: str) -> tuple[int, str]:
    number, _, protocol = text.partition("/")
    if not (number.isascii() and number.isdigit()) or protocol not in ("", "tcp", "udp"):
        raise UsageError(f"'{text}' is not a port of a machine", hint="for example 80 or 53/udp")
    return int(number), protocol or "tcp"


def _record(mapping: PortMapping) -> dict[str, object]:
    return mapping._asdict()


PORT = Command(
    port,
    usage="MACHINE [PORT[/PROTOCOL]]",
    words=(1, 2),
    flags=(listing.JSON,),
    examples=(
        ("nagaya port web", "80/tcp -> 127.0.0.1:8080"),
        ("nagaya port web 80 | xargs curl", "the page of a machine whose port the host chose"),
    ),
)
