"""What is added to Linux before it is compiled: files of our own, and a patch that has Linux call them."""

from __future__ import annotations

import os

from nagaya.static import NamedTuple

_HOOKS = "hooks.patch"


class Patch(NamedTuple):
    """Files in `directory` that go to `target` in a tree of Linux, and the hooks for them; `symbol` turns them on."""

    name: str
    directory: str
    target: str
    symbol: str

    def fits(self, tree: str) -> bool:
        """Whether the hooks can be put into this Linux. Changes nothing."""
        import subprocess  # lazy: 8 ms

        dry = subprocess.run([*self.command(tree), "--dry-run"], capture_output=True, check=False)
        return dry.returncode == 0

    def command(self, tree: str) -> list[str]:
        """The patch(1) that puts the hooks in."""
        hooks = os.path.join(self.directory, _HOOKS)
        return ["patch", "-d", tree, "-p1", "--force", "--fuzz=0", "--no-backup-if-mismatch", "-i", hooks]

    def copy_files(self, tree: str) -> None:
        """Put the files there. Raises `OSError`."""
        import shutil  # lazy: only a build needs it

        for name in self._files():
            shutil.copyfile(os.path.join(self.directory, name), os.path.join(tree, self.target, name))

    def digest(self) -> str:
        """SHA-256 of all of it, in hexadecimal. Raises `OSError`."""
        import hashlib  # lazy: only a build needs it

        made = hashlib.sha256()
        for name in (*self._files(), _HOOKS):
            with open(os.path.join(self.directory, name), "rb") as file:
                made.update(f"{name}\0".encode())
                made.update(file.read())
        return made.hexdigest()

    def _files(self) -> list[str]:
        return sorted(name for name in os.listdir(self.directory) if name.endswith((".c", ".h", ".S")))


def shipped(architecture: str) -> tuple[Patch, ...]:
    """Those that come with this package, for kernels of one CPU."""
    if architecture != "x86_64":
        return ()
    directory = os.path.join(os.path.dirname(__file__), "deprivileged")
    return (Patch("the kernel in user mode", directory, "arch/x86/kernel", "CONFIG_DEPRIVILEGED"),)
