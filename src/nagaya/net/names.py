"""What machines get for /etc/resolv.conf and /etc/hosts. Pure: text in, text out."""

from __future__ import annotations

FALLBACK_DNS = ("1.1.1.1", "8.8.8.8")


def resolv_conf(host_text: str, dns: tuple[str, ...], *, own_namespace: bool) -> str:
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
        elif words[0] in ("search", "options", "domain"):
            others.append(" ".join(words))
    if own_namespace:
        servers = [server for server in servers if not (server.startswith("127.") or server == "::1")]
    chosen = dns or tuple(servers) or (FALLBACK_DNS if own_namespace else ())
    return "".join(f"{line}\n" for line in [*others, *(f"nameserver {server}" for server in chosen)])


def hosts(hostname: str, address: str, extra: tuple[tuple[str, str], ...]) -> str:
    """An /etc/hosts with the machine's own name and the caller's lines."""
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines.append(f"{address or '127.0.1.1'}\t{hostname}")
    lines += [f"{where}\t{name}" for name, where in extra]
    return "\n".join(lines) + "\n"
