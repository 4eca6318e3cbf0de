"""What machines get for /etc/resolv.conf and /etc/hosts. Pure: text in, text out."""

from __future__ import annotations

FALLBACK_DNS = ("1.1.1.1", "8.8.8.8")


def has_nameserver(text: str) -> bool:
    """Whether a resolver file names a server."""
    return any(line.split()[:1] == ["nameserver"] and len(line.split()) > 1 for line in text.splitlines())


def resolv_conf(host_text: str, dns: tuple[str, ...], *, own_namespace: bool, search: tuple[str, ...] = ()) -> str:
    """The host's resolver file for a machine.

    `dns` replaces the host's servers. In a network namespace of its own a machine cannot reach a resolver on the
    host's loopback: such servers are left out, and where none is left, public ones take their place.
    """
    servers, others = [], []
    for line in host_text.splitlines():
        words = line.split()
        if not words or words[0][0] in "#;":
            continue
        if words[0] == "nameserver" and len(words) > 1:
            servers.append(words[1])
        elif words[0] == "options" or (words[0] in ("search", "domain") and not search):
            others.append(" ".join(words))
    if search:
        others.append(f"search {' '.join(search)}")
    if own_namespace:
        servers = [server for server in servers if not (server.startswith("127.") or server == "::1")]
    chosen = dns or tuple(servers) or (FALLBACK_DNS if own_namespace else ())
    return "".join(f"{line}\n" for line in [*others, *(f"nameserver {server}" for server in chosen)])


def hosts(hostname: str, addresses: tuple[str, ...], extra: tuple[tuple[str, str], ...]) -> str:
    """An /etc/hosts with the machine's own name, by each of its addresses, and the caller's (name, address) lines."""
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{address}\t{hostname}" for address in addresses or ("127.0.1.1",)]
    lines += [f"{where}\t{name}" for name, where in extra]
    return "\n".join(lines) + "\n"
