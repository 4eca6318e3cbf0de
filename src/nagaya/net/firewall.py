"""The firewall of a bridge, in an nftables table of its own: nobody else's rules are read or touched."""

from __future__ import annotations

from nagaya.errors import LaunchError, Unsupported
from nagaya.kernel.netlink import has_nft_table


def table_name(bridge: str) -> str:
    return bridge.replace("-", "_")


def ruleset(bridge: str, subnet: str) -> str:
    """The table's text: machines reach out with the host's address, and nobody reaches in unasked."""
    table = table_name(bridge)
    return f"""table inet {table} {{
	chain forward {{
		type filter hook forward priority filter; policy accept;
		oifname "{bridge}" ct state established,related accept
		oifname "{bridge}" iifname "{bridge}" accept
		oifname "{bridge}" drop
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {subnet} oifname != "{bridge}" masquerade
	}}
}}
"""


def ensure(bridge: str, subnet: str) -> None:
    """Load the table unless it is there. One transaction: it is there whole, or not."""
    if has_nft_table(table_name(bridge)):
        return
    # "add, then delete, then the new one" in one transaction: right whatever another start has just done.
    table = f"table inet {table_name(bridge)}"
    _run_nft(f"add {table}\ndelete {table}\n{ruleset(bridge, subnet)}")


def remove(bridge: str) -> None:
    if has_nft_table(table_name(bridge)):
        _run_nft(f"delete table inet {table_name(bridge)}\n")


def _run_nft(text: str) -> None:
    import subprocess  # lazy: 8 ms, once per boot of the host

    try:
        done = subprocess.run(["nft", "-f", "-"], input=text.encode(), capture_output=True, check=False, timeout=30)
    except FileNotFoundError:
        raise Unsupported(
            "the default network needs the program 'nft', which is not installed",
            hint="apt install nftables, or use --network none or --network host",
        ) from None
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip().splitlines()
        raise LaunchError(
            f"nft could not load the firewall: {tail[0] if tail else 'no reason given'}",
            hint="the kernel may lack nf_tables; use --network none or --network host",
            command="nft -f -",
            status=done.returncode,
            log_tail="\n".join(tail[-5:]),
        )
