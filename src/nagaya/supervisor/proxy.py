"""The process that relays what comes to a machine's published ports on this host: a child of its supervisor's, made when
the first client comes, with the ports' sockets, nobody's rights, and nothing else. It dies with the supervisor.
"""

from __future__ import annotations

import gc
import os
import resource
import signal

from nagaya.kernel.inet import TCP
from nagaya.kernel.process import PR_SET_NO_NEW_PRIVS, become, close_all_but, die_with, prctl
from nagaya.static import NamedTuple, NoReturn
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.proxy_tcp import MOST_CONNECTIONS, TcpRelay
from nagaya.supervisor.proxy_udp import MOST_CLIENTS, UdpRelay

NOBODY = 65534
_FILES = 2 * MOST_CONNECTIONS + MOST_CLIENTS + 1000
_FEWEST_FILES = 64
_OWN_FILES = 32  # the loop's, and pipes under way


class Relayed(NamedTuple):
    """A socket of a published port, and where in the machine its clients are led to."""

    socket: int
    protocol: str  # "tcp" | "udp"
    address: str
    port: int


def start(relayed: tuple[Relayed, ...]) -> int:
    """Fork. The child's pid. Raises `OSError`."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        gc.disable()  # a collection would write to, and so copy, every page that we share with the supervisor
        _run(relayed, parent)
    return pid


def _run(relayed: tuple[Relayed, ...], parent: int) -> NoReturn:
    """In the child; never returns."""
    try:
        close_all_but([port.socket for port in relayed])
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        files = _allow_files()
        if os.geteuid() == 0:
            become(NOBODY)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        die_with(parent)  # only now: whoever changes its ids loses it
        serve(relayed, most_files=files)
    finally:
        os._exit(1)  # the supervisor makes another one for the next client


def _allow_files() -> int:
    """As many descriptors as a full relay has, where that is allowed; how many it is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files


def serve(relayed: tuple[Relayed, ...], *, most_files: int = _FILES) -> None:
    """Relay for ever."""
    loop = Loop()
    room = max(_FEWEST_FILES, most_files - len(relayed) - _OWN_FILES)
    tcp = TcpRelay(loop, most=min(MOST_CONNECTIONS, room // 3))
    udp = UdpRelay(loop, most=min(MOST_CLIENTS, room // 3))
    for port in relayed:
        (tcp if port.protocol == TCP else udp).add(port.socket, port.address, port.port)
    loop.run()
