"""The CPUs that guest kernels are built for: what make(1), the compilers and QEMU call them and want of them."""

from __future__ import annotations

import os

from nagaya.errors import UsageError
from nagaya.static import NamedTuple


class Architecture(NamedTuple):
    """One of them. `name` is uname(2)'s."""

    name: str
    make: str  # ARCH=
    target: str  # what to make
    image: str  # where that is in the tree
    file: str  # and its name in the cache
    flags: str = ""  # KCFLAGS=
    directories: tuple[str, ...] = ()  # of drivers that its board needs and others do not

    @property
    def cross(self) -> str:
        """What the names of its compiler's programs begin with on this host: "" for the host's own."""
        return "" if os.uname().machine == self.name else f"{self.name}-linux-gnu-"


X86_64 = Architecture(
    name="x86_64",
    make="x86_64",
    target="vmlinux",
    image="vmlinux",
    file="vmlinux",
    # GCC makes code that runs once, as __init does, small: clearing memory becomes `rep stosb`, a byte at a time. Silicon
    # does that quickly; where instructions are emulated (PVM, TCG) it is eight times the work.
    flags="-mstringop-strategy=rep_8byte",
)
# QEMU hands its device tree only to a kernel in the flat format of these.
AARCH64 = Architecture(
    name="aarch64",
    make="arm64",
    target="Image",
    image="arch/arm64/boot/Image",
    file="Image",
    directories=("clk", "power"),
)
RISCV64 = Architecture(
    name="riscv64",
    make="riscv",
    target="Image",
    image="arch/riscv/boot/Image",
    file="Image",
    directories=("clk", "mfd", "power"),
)
ARCHITECTURES = {one.name: one for one in (X86_64, AARCH64, RISCV64)}


def find_architecture(name: str = "") -> Architecture:
    """The architecture called `name`; "" = this host's. Raises `UsageError`."""
    found = ARCHITECTURES.get(name or os.uname().machine)
    if found is None:
        raise UsageError(
            f"no guest kernel can be built for {name or os.uname().machine}", hint=f"one of: {', '.join(ARCHITECTURES)}"
        )
    return found
