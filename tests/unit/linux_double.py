"""A tiny "Linux": an archive whose Makefile understands what the builder asks of it, within milliseconds."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

# allnoconfig keeps every wanted line but CONFIG_GONE; vmlinux is any ELF file; NAGAYA_TEST_* steer single tests.
_MAKEFILE = """\
.PHONY: allnoconfig vmlinux
allnoconfig:
\t@test "$(ARCH)" = x86_64
\t@grep -v CONFIG_GONE "$(KCONFIG_ALLCONFIG)" > .config
vmlinux:
\t@test -f .config
\t@echo "  CC      init/main.o"
\t@echo "  LD      vmlinux"
\t@echo a warning >&2
\t@echo "$(MAKEFLAGS)" > made-with
\t@exec sh -c "$$NAGAYA_TEST_COMPILER"
\t@mkdir -p include/config && echo 6.1.999-double > include/config/kernel.release
\t@cp /bin/true vmlinux
"""


def write_linux(path: Path, *, kbuild: bool = True, extra: str = "") -> str:
    """Write the archive, and answer its path. Two with the same contents have the same bytes."""
    members = {"Makefile": _MAKEFILE, "CREDITS": extra} | ({"Kbuild": "# top\n"} if kbuild else {})
    members |= {"drivers/gpu/card.c": "int card;\n", "drivers/gpu/Kconfig": "# menu\n"}
    with tarfile.open(path, "w") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"linux-6.1/{name}")
            info.size, info.mtime, info.mode = len(text), 1_700_000_000, 0o644
            archive.addfile(info, io.BytesIO(text.encode()))
    return os.fspath(path)


class Told:
    """A `Progress` that keeps what it was told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.counts: list[tuple[int, int, str]] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def count(self, done: int, expected: int, what: str) -> None:
        self.counts.append((done, expected, what))
