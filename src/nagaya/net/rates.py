"""How fast a machine may send and receive (--net-rate): at the host's end of each of its links, where it cannot help it.

What it receives is shaped, by a token bucket (tc-tbf(8)) that queues up to 50 ms. What it sends cannot be queued on the
way in, so what is above the rate is dropped (nft's limit), and TCP finds the rate by that. The kernels that we know of
have no ingress classifier everywhere, which redirecting to an ifb device or policing by tc would need.
"""

from __future__ import annotations

from nagaya.errors import LaunchError, Unsupported
from nagaya.kernel.nftables import NFPROTO_NETDEV, count_rules
from nagaya.net import programs

LEAST_BURST_BYTES = (
    160 << 10
)  # a packet before segmentation has 64 KiB, and one that is larger than the bucket never fits
BURST_S = 0.05
QUEUE = "50ms"


def burst_bytes(bits: int) -> int:
    return max(LEAST_BURST_BYTES, int(bits / 8 * BURST_S))


def tc_words(link: str, bits: int) -> list[str]:
    return [
        "tc", "qdisc", "replace", "dev", link, "root", "tbf", "rate", f"{bits}bit", "burst", f"{burst_bytes(bits)}b",
        "latency", QUEUE,
    ]  # fmt: skip


def nft_text(link: str, bits: int) -> str:
    """A table for each link: its chain goes with the device, the empty table by `lift`."""
    return f"""add table netdev {link}
delete table netdev {link}
table netdev {link} {{
	chain out {{
		type filter hook ingress device "{link}" priority filter; policy accept;
		limit rate over {max(1, bits // 8)} bytes/second burst {burst_bytes(bits)} bytes drop
	}}
}}
"""


def limit(link: str, bits: int) -> None:
    """Of a host's link that is there; 0 = leave it. Raises `LaunchError`, `Unsupported`."""
    if not bits:
        return
    for argv, text, package in (
        (tc_words(link, bits), "", "iproute2"),
        (["nft", "-f", "-"], nft_text(link, bits), "nftables"),
    ):
        try:
            done = programs.run(argv, text)
        except FileNotFoundError:
            raise Unsupported(
                f"--net-rate needs the program '{argv[0]}', which is not installed",
                hint=f"apt install {package}, or leave --net-rate away",
                finding=f"it was looked for in PATH and {programs.PATH}",
            ) from None
        if done.status:
            raise LaunchError(
                f"{argv[0]} could not limit the machine's rate: {done.text.partition(chr(10))[0] or 'no reason given'}",
                hint="this kernel may lack sch_tbf or nf_tables; leave --net-rate away",
                command=" ".join(argv),
                status=done.status,
                log_tail=done.text,
            )


def is_limited(link: str) -> bool:
    """Whether the half that anybody's `nft flush ruleset` takes away is there."""
    return bool(count_rules(NFPROTO_NETDEV, link))


def lift(link: str) -> None:
    """Take away what the link's end has left."""
    if count_rules(NFPROTO_NETDEV, link) is not None:
        programs.run(["nft", "-f", "-"], f"add table netdev {link}\ndelete table netdev {link}\n")
