"""What comes to and goes from a whole machine that runs: disks and network cards, behind ports that it was born with.

A system has to let go of a device before it is taken out (PCI hot-plug by ACPI, or PCI Express's own): one that does not
keeps it. What fits into a machine's memory while it runs is smaller than what it was started with: a balloon takes the rest.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

from nagaya.engines.qemu.media import add_image, remove_image
from nagaya.engines.qemu.monitor import Monitor
from nagaya.engines.qemu.pc_arguments import CARD_PORTS, card_port, device_name, drive_name
from nagaya.errors import Conflict, RemoteError, Unsupported
from nagaya.model.spec import Drive
from nagaya.net import tap
from nagaya.net.plan import LinkPlan
from nagaya.protocol.qmp import QmpError
from nagaya.static import Any
from nagaya.storage.disk_images.chain import open_chain

LETS_GO_WITHIN_S = 10.0
BALLOON_MOVES_WITHIN_S = 3.0
_RESIZED_WITHIN_S = 30.0


def plug_disk(monitor: Monitor, drive: Drive, path: str, *, allowed: tuple[str, ...], queues: int) -> None:
    """`queues` 0 = QEMU's choice. Raises as `open_chain`, and leaves nothing then."""
    name = drive_name(drive, 0)
    more: Any = {"num-queues": queues} if queues else {}
    with ExitStack() as stack:
        chain = open_chain(
            path, stack, format=drive.format, writable=not drive.read_only, allowed=allowed,
            allow_backing=drive.allow_backing,
        )  # fmt: skip
        add_image(monitor, name, chain)
        try:
            monitor.command(
                "device_add", driver="virtio-blk-pci", id=device_name(name), bus=f"slot{drive.slot}", drive=name,
                serial=name, **more,
            )  # fmt: skip
        except BaseException:
            remove_image(monitor, name)
            raise


def unplug_disk(monitor: Monitor, drive: Drive) -> None:
    """Raises `Conflict` when the system does not let go of it: it has it still then."""
    name = drive_name(drive, 0)
    if not _eject(monitor, device_name(name), LETS_GO_WITHIN_S):
        raise Conflict(
            f"the machine's system has not let go of the disk within {LETS_GO_WITHIN_S:.0f} s",
            hint="unmount it inside and try again, or take it out while the machine is off",
            state="in use",
        )
    remove_image(monitor, name)


def resize_disk(monitor: Monitor, name: str, size_bytes: int) -> None:
    """Make the disk with the node name `name` larger; its system is told."""
    try:
        monitor.command("block_resize", timeout_s=_RESIZED_WITHIN_S, node_name=name, size=size_bytes)
    except QmpError as error:
        if "not support" in error.message or "snapshots" in error.message:
            raise Unsupported(f"the disk cannot be resized while it is in use: {error.message}") from None
        raise


def plug_card(monitor: Monitor, link: LinkPlan, *, compat: bool) -> int:
    """Connect a new card to the tap device that the host has prepared; the number of its port. Raises `Conflict`."""
    taken = _peripherals(monitor)
    port = next((number for number in range(CARD_PORTS) if f"card{number}" not in taken), -1)
    if port < 0:
        raise Unsupported(
            f"a machine has {CARD_PORTS} ports for network cards, and all are taken", hint="stop it first"
        )
    name = f"net{port}"
    fd = tap.open_link(link)
    try:
        monitor.command("getfd", descriptor=fd, fdname=name)
    finally:
        os.close(fd)
    monitor.command("netdev_add", type="tap", id=name, fd=name, vhost=False)
    where: Any = {} if compat else {"bus": card_port(port)}
    try:
        monitor.command(
            "device_add", driver="e1000" if compat else "virtio-net-pci", id=f"card{port}", netdev=name, mac=link.mac,
            **where,
        )  # fmt: skip
    except BaseException:
        monitor.command("netdev_del", id=name)
        raise
    return port


def unplug_card(monitor: Monitor, port: int) -> None:
    """Pull its cable out now, and the card as soon as the system lets go of it: its port is free then."""
    _eject(monitor, f"card{port}", 0)
    monitor.command("netdev_del", id=f"net{port}")


def _peripherals(monitor: Monitor) -> set[str]:
    """The names of the devices that have one."""
    try:
        return {str(each["name"]) for each in monitor.command("qom-list", path="/machine/peripheral")}
    except (KeyError, TypeError):
        raise RemoteError("QEMU did not say which devices the machine has") from None


def _eject(monitor: Monitor, device: str, within_s: float) -> bool:
    """Ask the system to let go of a device; whether it has done so within that time, or had before."""
    deadline_s = time.monotonic() + within_s
    try:
        monitor.command("device_del", id=device)
    except QmpError as error:
        if "not found" in error.message:
            return True
        if "already in the process" not in error.message:
            raise
    while within_s:
        left_s = deadline_s - time.monotonic()
        try:
            if monitor.await_event("DEVICE_DELETED", left_s).data.get("device") == device:
                return True
        except QmpError:
            break  # nothing has come
    return device not in _peripherals(monitor)


def set_memory(monitor: Monitor, wanted_bytes: int) -> None:
    """Blow the balloon up, or let air out, until the system has so much memory. Raises `Unsupported`.

    It gives what it can spare, over some time: that it has begun to shows that it has a driver for the balloon.
    """
    if _balloon(monitor) == wanted_bytes:
        return
    monitor.forget("BALLOON_CHANGE")
    monitor.command("balloon", value=wanted_bytes)
    try:
        monitor.await_event("BALLOON_CHANGE", BALLOON_MOVES_WITHIN_S)
    except QmpError:
        now = _balloon(monitor)
        monitor.command("balloon", value=now)
        raise Unsupported(
            "the machine's memory does not change: its system has no driver for the balloon, or is not up yet",
            hint="stop it first: it starts with the new size",
        ) from None


def _balloon(monitor: Monitor) -> int:
    try:
        return int(monitor.command("query-balloon")["actual"])
    except (KeyError, TypeError, ValueError):
        raise RemoteError("QEMU did not say how much memory the machine has") from None
