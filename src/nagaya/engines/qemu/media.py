"""Disk images of a QEMU that runs: handed over as descriptors, given names, and taken back with their locks."""

from __future__ import annotations

from nagaya.engines.qemu.monitor import Monitor
from nagaya.errors import RemoteError, Unsupported
from nagaya.protocol.qmp import QmpError
from nagaya.static import Any
from nagaya.storage.disk_images.chain import Chain


def describe(chain: Chain, files: tuple[str, ...]) -> dict[str, Any]:
    """The image as QEMU's block options. Raises `Unsupported` for one in several files, which QEMU would look for."""
    if any(layer.header.extents for layer in chain.layers):
        raise Unsupported(
            f"'{chain.top.path}' is a VMDK in several files, which no machine can use",
            hint="convert it: nagaya disk convert",
        )
    node = chain.node(files=files)
    if chain.writable:  # what the system discards becomes a hole here too
        node["discard"] = node["file"]["discard"] = "unmap"
    return node


def add_image(monitor: Monitor, name: str, chain: Chain) -> None:
    """Give QEMU the opened image under the node name `name`. It has nothing of it when this raises."""
    try:
        files = tuple(f"/dev/fdset/{_give(monitor, name, fd)}" for fd in chain.descriptors)
        options: Any = {key.replace("-", "_"): value for key, value in describe(chain, files).items()}
        monitor.command("blockdev-add", node_name=name, **options)
    except BaseException:
        _take_back(monitor, name)
        raise


def remove_image(monitor: Monitor, name: str) -> None:
    """QEMU closes the image, whose locks go with that. Nothing when there is none of that name."""
    try:
        monitor.command("blockdev-del", node_name=name)
    except QmpError as error:
        if "Failed to find" not in error.message and "Cannot find" not in error.message:
            raise
    _take_back(monitor, name)


def _give(monitor: Monitor, name: str, fd: int) -> int:
    """The number of the set that QEMU keeps its copy of the descriptor in."""
    answer = monitor.command("add-fd", descriptor=fd, opaque=name)
    try:
        return int(answer["fdset-id"])
    except (KeyError, TypeError, ValueError):
        raise RemoteError("QEMU did not say what became of a descriptor") from None


def _take_back(monitor: Monitor, name: str) -> None:
    """QEMU keeps what it was given until it is told otherwise, whatever it has closed."""
    try:
        sets = [
            int(each["fdset-id"])
            for each in monitor.command("query-fdsets")
            if any(fd.get("opaque") == name for fd in each["fds"])
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RemoteError("QEMU did not say which descriptors it has") from None
    for number in sets:
        monitor.command("remove-fd", fdset_id=number)
