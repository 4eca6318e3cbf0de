"""A Debian installer in a machine's directory, as long as the machine's system is not there: QEMU starts it without a loader.

The answers to its questions are in its initramfs, and two steps of ours: for root's keys, and for telling that it is done.
"""

from __future__ import annotations

import os
import shutil
import stat

from nagaya.errors import HostError, IntegrityError, NagayaError
from nagaya.model.spec import Drive, MachineSpec
from nagaya.static import NamedTuple
from nagaya.storage import records
from nagaya.storage.cpio import Entry, make_cpio
from nagaya.storage.plan import InstallPlan
from nagaya.storage.tree import remove_tree

KERNEL, INITRAMFS = "linux", "initrd.gz"
_PRESEED = "preseed.cfg"  # where the installer looks first (installation guide, appendix B.2.1)
_PLACE, _DONE = "install", "installed"
_CONSOLES = {"linux/amd64": "ttyS0,115200", "linux/arm64": "ttyAMA0,115200", "linux/riscv64": "ttyS0,115200"}
MARK = b"nagaya: the system is installed"
# finish-install runs what is there in order, unmounts the disk at 95, and restarts the machine at its end.
_STEPS = "usr/lib/finish-install.d"
_KEYS = "authorized_keys"
_PUT_KEYS = f"""#!/bin/sh
mkdir -p -m 700 /target/root/.ssh && cat /{_KEYS} >> /target/root/.ssh/{_KEYS} && chmod 600 /target/root/.ssh/{_KEYS}
exit 0
"""
_SAY_MARK = f"#!/bin/sh\necho '{MARK.decode()}' > /dev/console\nexit 0\n"


class InstallerFiles(NamedTuple):
    """Paths. `disc` is what the machine needs in a drive meanwhile; "" = nothing."""

    kernel: str
    initramfs: str
    disc: str = ""


def put_into(directory: str, files: InstallerFiles, preseed: bytes, keys: tuple[str, ...]) -> None:
    """Give the machine whose directory it is the installer, with the answers and root's keys in its initramfs.

    QEMU's user can read it. Raises `HostError`.
    """
    parts = _STEPS.split("/")
    entries = [
        Entry(_PRESEED, stat.S_IFREG | 0o600, preseed),
        Entry(_KEYS, stat.S_IFREG | 0o600, "".join(f"{key}\n" for key in keys).encode()),
        *(Entry("/".join(parts[: depth + 1]), stat.S_IFDIR | 0o755) for depth in range(len(parts))),
        Entry(f"{_STEPS}/90nagaya", stat.S_IFREG | 0o755, _PUT_KEYS.encode()),
        Entry(f"{_STEPS}/96nagaya", stat.S_IFREG | 0o755, _SAY_MARK.encode()),
    ]
    place = f"{directory}/{_PLACE}"
    try:
        os.mkdir(place, 0o700)
        for source, name in ((files.kernel, KERNEL), (files.initramfs, INITRAMFS)):
            shutil.copyfile(source, f"{place}/{name}")
            os.chmod(f"{place}/{name}", 0o644)
        with open(f"{place}/{INITRAMFS}", "ab") as file:
            file.write(bytes(-file.tell() % 4) + make_cpio(entries))
    except OSError as error:
        raise HostError.from_os(error, "cannot keep the installer") from None


def find_in(directory: str, spec: MachineSpec) -> InstallPlan | None:
    """How the machine starts its installer; None when its system is installed. Raises `IntegrityError`."""
    place = f"{directory}/{_PLACE}"
    if not is_installing(directory):
        return None
    plan = InstallPlan(f"{place}/{KERNEL}", f"{place}/{INITRAMFS}", command_line(_CONSOLES[spec.platform]))
    for path in (plan.kernel, plan.initramfs):
        if not os.path.isfile(path):
            raise IntegrityError(f"a part of the machine's installer is missing ({path})", hint="remove the machine")
    return plan


def with_disc(spec: MachineSpec) -> MachineSpec:
    """The machine with its installer's disc in a further drive, which it has until its system is there."""
    hardware = spec.hardware
    if hardware is None or hardware.install is None or not hardware.install.disc:
        return spec
    disc = Drive(hardware.install.disc, "raw", cdrom=True, read_only=True)
    return spec._replace(hardware=hardware._replace(drives=(*hardware.drives, disc)))


def command_line(console: str) -> str:
    """The kernel's, of an installer that asks nothing, and whose words on the console are lines of text.

    TERM is what keeps it from running in GNU Screen. What stands behind the dashes is for the installed system, too.
    """
    return f"auto=true priority=critical DEBIAN_FRONTEND=text TERM=dumb quiet console={console} --- console={console}"


def is_installing(directory: str) -> bool:
    """Whether the system is not there yet."""
    return os.path.isdir(f"{directory}/{_PLACE}")


def settle(directory: str) -> None:
    """The system is installed: from the next start on the machine boots its disk. Raises `HostError`."""
    try:
        os.rename(f"{directory}/{_PLACE}", f"{directory}/{_DONE}")  # the one step that counts, whatever follows
        records.sync(directory)
        remove_tree(f"{directory}/{_DONE}")
    except OSError as error:
        raise HostError.from_os(error, "cannot record that the system is installed") from None
    except NagayaError:
        return  # some of its files stay, until the machine goes
