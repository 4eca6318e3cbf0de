"""What QEMU, and a TPM beside it, may do: nothing, where root starts it. Its guest may take it over; it must not gain anything by that."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

from nagaya.engines.qemu.host_pci import PciDevice, show_nodes
from nagaya.engines.vm.parts import user_id
from nagaya.kernel import namespaces
from nagaya.kernel.process import become

MOST_FILES = 256


def plan_rights(
    machine_id: str,
    *,
    host_network: bool,
    groups: tuple[int, ...] = (),
    pci: tuple[PciDevice, ...] = (),
    memory_bytes: int = 0,
) -> Callable[[], None]:
    """What to do in the child before QEMU is executed. A plain user's QEMU stays that user's, for it can be nobody else's.

    `groups`: those whose devices it may open. `pci`: devices of the host's that it has, and `memory_bytes` what the guest has. `host_network`: QEMU's user-mode network opens sockets of the host; otherwise it sees an empty network.
    """

    def give_up() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
        if os.geteuid():
            return
        namespaces.unshare(namespaces.CLONE_NEWIPC | (0 if host_network else namespaces.CLONE_NEWNET))
        id_ = user_id(machine_id)
        if pci:
            show_nodes(pci, id_, memory_bytes=memory_bytes)
        become(id_, groups)

    return give_up
