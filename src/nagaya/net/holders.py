"""Who holds a port of this host, by proc(5): for the sentence that refuses it, and no more."""

from __future__ import annotations

import _socket
import os

_LISTENS = {"tcp": "0A", "udp": "07"}  # TCP_LISTEN; an unconnected UDP socket is TCP_CLOSE


def find_holder(protocol: str, address: str, port: int) -> str:
    """ "nginx (pid 123)"; "" when it cannot be known: another user's, or one of another container's."""
    inodes = _find_sockets(protocol, address, port)
    return _find_process(inodes) if inodes else ""


def _find_sockets(protocol: str, address: str, port: int) -> set[str]:
    found = set()
    for suffix in ("", "6"):
        try:
            with open(f"/proc/net/{protocol}{suffix}", encoding="utf-8") as file:
                lines = file.readlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            local, _, number = fields[1].rpartition(":")
            if int(number, 16) == port and fields[3] == _LISTENS[protocol] and _meets(local, address):
                found.add(fields[9])
    return found


def _meets(local: str, address: str) -> bool:
    """Whether a socket at `local` (32-bit words in the host's order, in hexadecimal) keeps us from `address`."""
    words = bytes.fromhex(local)
    raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    wanted = _socket.inet_pton(_socket.AF_INET6 if ":" in address else _socket.AF_INET, address)
    return not any(raw) or not any(wanted) or raw[-4:] == wanted[-4:]


def _find_process(inodes: set[str]) -> str:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in wanted:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                        return f"{file.read().strip()} (pid {pid})"
        except OSError:
            continue  # it has ended, or is not ours to look at
    return ""
