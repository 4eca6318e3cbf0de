"""A machine's published ports over its life: held from before its first boot until it has ended for good, led to it while
it runs. What comes from this host itself is relayed by a process of its own (proxy.py), made for the first client.
"""

from __future__ import annotations

import os
import signal

from nagaya.errors import IntegrityError
from nagaya.model.spec import MachineSpec, PortMapping
from nagaya.model.state import ALIVE
from nagaya.net import ports
from nagaya.net.plan import NONE
from nagaya.storage import machines
from nagaya.storage.paths import Paths
from nagaya.supervisor import proxy
from nagaya.supervisor.loop import Loop, Timer

RETRY_S = 0.5


class Published:
    """`hold` before each boot, `lead` when the machine runs, `cut_off` when a run has ended, `release` for good."""

    def __init__(self, loop: Loop, paths: Paths, spec: MachineSpec) -> None:
        self._loop = loop
        self._paths = paths
        self._id = spec.id
        self._wanted = spec.ports
        self.plan = NONE  # of the present run
        self._held: list[ports.HeldPort] = []
        self._relayed: tuple[proxy.Relayed, ...] = ()
        self._proxy = -1  # pidfd
        self._retry: Timer | None = None

    def hold(self, recorded: tuple[PortMapping, ...]) -> tuple[PortMapping, ...]:
        """Take the ports, unless they are held already; as they are now. Raises `Conflict`, `Unsupported`, `HostError`."""
        if not self._held:
            ports.allow_many(len(self._wanted))
            self._held = ports.hold(self._wanted, recorded, find_holder=self._find_holder)
        return tuple(port.mapping for port in self._held)

    def _find_holder(self, protocol: str, address: str, port: int) -> str:
        """A machine of this store by its name; else a process."""
        for machine_id in machines.ids(self._paths):
            try:
                state = machines.load_state(self._paths, machine_id)
                if machine_id == self._id or state.phase not in ALIVE or not machines.is_alive(self._paths, machine_id):
                    continue
                if any((one.protocol, one.host_port) == (protocol, port) for one in state.ports):
                    return f"machine '{machines.load_spec(self._paths, machine_id).name}'"
            except (FileNotFoundError, IntegrityError):
                continue  # it is being removed, or damaged: it says nothing
        from nagaya.net.holders import find_holder  # lazy: only when somebody is asked for

        return find_holder(protocol, address, port)

    def choose_private(self) -> tuple[PortMapping, ...]:
        """For a user-mode network, which listens itself for what it leads to the machine: ports that nobody else has, on
        a loopback address of the machine's own. What we hold is relayed there. Raises what `hold` does.
        """
        guest_ports = dict.fromkeys((port.guest_port, port.protocol) for port in self._wanted)
        address = ports.private_address(self._id)
        held = ports.hold(tuple(PortMapping(address, 0, port, protocol) for port, protocol in guest_ports))
        ports.release(held)
        return tuple(port.mapping for port in held)

    def lead(self) -> None:
        """The machine runs, or its links have changed: relay what comes to its ports, and what has come meanwhile."""
        plan = self.plan
        address = next((link.address or link.address6 for link in plan.links if link.driver == "bridge"), "")
        ends = {(port.guest_port, port.protocol): (port.host_address, port.host_port) for port in plan.forwards}
        relayed = tuple(
            proxy.Relayed(fd, port.mapping.protocol, *end)
            for port in self._held
            if (end := ends.get((port.mapping.guest_port, port.mapping.protocol), (address, port.mapping.guest_port)))[
                0
            ]
            for fd in port.sockets
        )
        if relayed != self._relayed:  # else what is under way goes on
            self.cut_off()
            self._relayed = relayed
            self._wait_for_clients()

    def _wait_for_clients(self) -> None:
        self._retry = None
        for relayed in self._relayed:
            self._loop.watch(relayed.socket, self._client_came)

    def _stop_waiting(self) -> None:
        for relayed in self._relayed:
            self._loop.forget(relayed.socket)

    def _client_came(self, events: int) -> None:
        self._stop_waiting()
        try:
            self._proxy = os.pidfd_open(proxy.start(self._relayed))  # our child, and not reaped: the pid is its own
        except OSError:  # no process, no memory: clients wait
            self._retry = self._loop.after(RETRY_S, self._wait_for_clients)
            return
        self._loop.watch(self._proxy, self._proxy_ended)

    def _proxy_ended(self, events: int) -> None:
        """It was killed from outside, or broke. Its connections are gone; later clients get another one."""
        self._reap()
        self._retry = self._loop.after(RETRY_S, self._wait_for_clients)

    def _reap(self) -> None:
        self._loop.forget(self._proxy)
        os.waitid(os.P_PIDFD, self._proxy, os.WEXITED)
        os.close(self._proxy)
        self._proxy = -1

    def cut_off(self) -> None:
        """The run is over: connections break off, and new clients wait for the next run."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._stop_waiting()
        self._relayed = ()
        if self._proxy >= 0:
            signal.pidfd_send_signal(self._proxy, signal.SIGKILL)
            self._reap()

    def release(self) -> None:
        """The machine has ended for good: the ports are free."""
        self.cut_off()
        ports.release(self._held)
        self._held = []
