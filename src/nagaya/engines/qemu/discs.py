"""Another disc for a CD drive of a whole machine that runs: QEMU is handed its descriptor."""

from __future__ import annotations

from contextlib import ExitStack

from nagaya.engines.qemu.monitor import Monitor
from nagaya.errors import RemoteError
from nagaya.protocol.qmp import QmpError
from nagaya.static import Any
from nagaya.storage.disk_images.chain import open_chain


def change(monitor: Monitor, number: int, path: str, format: str) -> None:
    """Take out what is in drive `number`, and put the image at `path` in ("" = nothing).

    The image is opened and locked first: what is wrong with it leaves the old disc in. Raises as `open_chain`.
    """
    device, node = f"cd{number}-device", f"cd{number}"
    with ExitStack() as stack:
        chain = open_chain(path, stack, format=format) if path else None
        monitor.command("blockdev-open-tray", id=device, force=True)
        monitor.command("blockdev-remove-medium", id=device)
        _forget(monitor, node)
        if chain is None:
            return
        files = tuple(f"/dev/fdset/{_give(monitor, fd)}" for fd in chain.descriptors)
        options: Any = {name.replace("-", "_"): value for name, value in chain.node(files=files).items()}
        monitor.command("blockdev-add", node_name=node, **options)
        monitor.command("blockdev-insert-medium", id=device, node_name=node)
        monitor.command("blockdev-close-tray", id=device)


def _forget(monitor: Monitor, node: str) -> None:
    """QEMU closes the old disc, whose lock goes with that."""
    try:
        monitor.command("blockdev-del", node_name=node)
    except QmpError as error:
        if "Failed to find" not in error.message and "Cannot find" not in error.message:
            raise


def _give(monitor: Monitor, fd: int) -> int:
    """The number of the set that QEMU keeps its copy of the descriptor in."""
    answer = monitor.command("add-fd", descriptor=fd)
    try:
        return int(answer["fdset-id"])
    except (KeyError, TypeError, ValueError):
        raise RemoteError("QEMU did not say what became of a descriptor") from None
