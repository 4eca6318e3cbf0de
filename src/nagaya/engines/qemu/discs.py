"""Another disc for a CD drive of a whole machine that runs: QEMU is handed its descriptor."""

from __future__ import annotations

from contextlib import ExitStack

from nagaya.engines.qemu.media import add_image, remove_image
from nagaya.engines.qemu.monitor import Monitor
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
        remove_image(monitor, node)
        if chain is None:
            return
        add_image(monitor, node, chain)
        monitor.command("blockdev-insert-medium", id=device, node_name=node)
        monitor.command("blockdev-close-tray", id=device)
