"""`nagaya network create`, `ls`, `inspect`, `rm`, `connect`, `disconnect` and `prune`."""

from __future__ import annotations

import sys

from nagaya.cli import filters, listing, network_views, values
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.network_flags import read_attachment
from nagaya.errors import EXIT_FAILURE, UsageError
from nagaya.manager.networks import NetworkOptions

_OPTIONS = ("mtu", "parent")


def create(context: Context, parsed: Parsed) -> int:
    """Make a network and print its id."""
    options = dict(_option(text) for text in parsed.texts("opt"))
    record = context.host.networks.create(
        parsed.words[0],
        NetworkOptions(
            driver=parsed.text("driver", "bridge"),
            subnets=tuple(parsed.texts("subnet")),
            gateways=tuple(parsed.texts("gateway")),
            ipv6=parsed.switch("ipv6"),
            internal=parsed.switch("internal"),
            mtu=values.parse_integer(options.get("mtu", "0"), "--opt mtu", least=0, most=65535),
            parent=options.get("parent", ""),
            labels=values.parse_labels(parsed.texts("label"), []),
        ),
    )
    print(record.id)
    return 0


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = key.removeprefix("com.docker.network.driver.")
    if key not in _OPTIONS or not equals:
        raise UsageError(f"--opt: '{text}' is none of mtu=, parent=", hint="for example --opt mtu=1400")
    return key, value


def ls(context: Context, parsed: Parsed) -> int:
    """List networks, after mending what somebody may have damaged of those in use."""
    _mend(context)
    wanted = filters.parse_filters(parsed.texts("filter"), filters.NETWORK_KEYS)
    host = context.host.networks
    found = [
        record
        for record in host.list()
        if filters.matches_network(
            wanted,
            record.name,
            record.id,
            record.driver,
            dict(record.labels),
            is_used=lambda name: bool(host.users(name)),
        )
    ]
    no_trunc = parsed.switch("no-trunc")
    listing.print_list(
        parsed,
        network_views.NETWORKS,
        rows=lambda: [network_views.network_row(record, no_trunc=no_trunc) for record in found],
        records=lambda: [network_views.network_record(record) for record in found],
        ids=lambda: [record.id if no_trunc else record.id[:12] for record in found],
    )
    for problem in host.damaged():
        from nagaya.cli.failures import report  # lazy: rare

        report(problem, debug=context.debug)
    return 0


def inspect(context: Context, parsed: Parsed) -> int:
    """Show networks and who is where on them."""
    _mend(context)
    found: list[dict[str, object]] = []
    status = each_name(context, parsed.words, lambda name: found.append(context.host.networks.inspect(name)))
    format = parsed.text("format")
    if format and format != "json":
        from nagaya.cli.template import Template  # lazy: only --format

        template = Template(format)
        for data in found:
            sys.stdout.write(template.render(data) + "\n")
    else:
        listing.print_json(found)
    return status


def rm(context: Context, parsed: Parsed) -> int:
    """Remove networks that no machine is on."""

    def remove(name: str) -> None:
        context.host.networks.remove(name, force=parsed.switch("force"))
        print(name)

    return each_name(context, parsed.words, remove)


def connect(context: Context, parsed: Parsed) -> int:
    """Plug a machine into a network, now where it can be done."""
    network, machine = parsed.words
    _tell(context.host.networks.connect(network, machine, read_attachment(parsed)), "connected")
    return 0


def disconnect(context: Context, parsed: Parsed) -> int:
    """Take a machine off a network."""
    network, machine = parsed.words
    _tell(context.host.networks.disconnect(network, machine), "disconnected")
    return 0


def _tell(when: str, what: str) -> None:
    """Nothing for what has been done; where it waits, since when and why."""
    if when != "now":
        sys.stderr.write(f"{what} {when}\n")


def prune(context: Context, parsed: Parsed) -> int:
    """Remove all networks that no machine is on."""
    if not parsed.switch("force"):
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask on", hint="-f removes without asking")
        sys.stderr.write("This removes:\n  - all networks that no machine is on\nGo on? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return EXIT_FAILURE
    removed = context.host.networks.prune()
    if parsed.switch("json"):
        listing.print_json({"networks": removed})
    else:
        for name in removed:
            print(name)
    return 0


def _mend(context: Context) -> None:
    for sentence in context.host.networks.mend():
        sys.stderr.write(f"{sentence}\n")


CREATE = Command(
    create,
    usage="NETWORK",
    words=(1, 1),
    flags=(
        Flag("-d --driver", "bridge (default) or macvlan", value="DRIVER"),
        Flag("--subnet", "Subnet, one of IPv4 and one of IPv6 (default: free ones)", value="SUBNET", many=True),
        Flag(
            "--gateway", "This host's address in it, for each --subnet (default: the first)", value="ADDRESS", many=True
        ),
        Flag("--ipv6", "Give machines IPv6 addresses too", default=True),
        Flag("--internal", "No way out: machines reach each other alone"),
        Flag("-o --opt", "mtu=BYTES; of a macvlan network parent=LINK", value="KEY=VALUE", many=True),
        Flag("-l --label", "Label the network", value="KEY[=VALUE]", many=True),
    ),
    about="Machines of all types on one network reach each other, by name too; other networks' machines do not.",
    examples=(
        ("nagaya network create front", ""),
        ("nagaya run -d --name web --network front debian", "a machine on it"),
        ("nagaya network create --internal --subnet 172.30.0.0/24 back", "without a way out"),
        ("nagaya network create -d macvlan -o parent=eth0 --subnet 192.168.1.0/24 lan", "on the local network"),
    ),
)
LS = Command(
    ls,
    flags=(listing.FILTER, listing.FORMAT, listing.JSON, listing.NO_TRUNC, listing.QUIET),
    about="Filters: " + ", ".join(filters.NETWORK_KEYS) + ".",
    examples=(("nagaya network ls --filter dangling=true", "those that no machine is on"),),
)
INSPECT = Command(
    inspect,
    usage="NETWORK [NETWORK...]",
    words=(1, MANY),
    flags=(
        Flag("-f --format", "A Go template such as '{{.Subnet}}', or json", value="FORMAT"),
        Flag("--json", "Print one JSON array (as without it)"),
    ),
    examples=(
        ("nagaya network inspect nagaya0", "who is where on the default network"),
        ("nagaya network inspect -f '{{range .machines}}{{.machine}} {{.address}} {{end}}' front", ""),
    ),
)
RM = Command(
    rm,
    usage="NETWORK [NETWORK...]",
    words=(1, MANY),
    flags=(Flag("-f --force", "Also one that machines which do not run are on"),),
    examples=(("nagaya network rm front", ""),),
)
CONNECT = Command(
    connect,
    usage="NETWORK MACHINE",
    words=(2, 2),
    flags=(
        Flag("--ip", "IPv4 address in it", value="ADDRESS"),
        Flag("--ip6", "IPv6 address in it", value="ADDRESS"),
        Flag("--mac-address", "MAC address in it", value="ADDRESS"),
        Flag("--alias", "Further name on it", value="NAME", many=True),
    ),
    about="At once, for a container, and for a virtual machine that has a card which is on no network. Its cards are those that it"
    " was started with: otherwise it gets one at its next start, and this command says so.",
    examples=(("nagaya network connect --alias db back web", ""),),
)
DISCONNECT = Command(
    disconnect,
    usage="NETWORK MACHINE",
    words=(2, 2),
    about="At once for all types: a virtual machine keeps the card, with its cable pulled out, for 'network connect'.",
    examples=(("nagaya network disconnect back web", ""),),
)
PRUNE = Command(
    prune,
    flags=(Flag("-f --force", "Do not ask"), listing.JSON),
    examples=(("nagaya network prune -f", ""),),
)
