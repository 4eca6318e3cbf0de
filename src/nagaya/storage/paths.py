"""Where things are: the only module that knows the store's layout (docs/internals.md)."""

from __future__ import annotations

import os

from nagaya.errors import UsageError
from nagaya.static import NamedTuple


class Paths(NamedTuple):
    """The store's two roots: `root` outlives a reboot, `run` does not."""

    root: str
    run: str

    @property
    def images(self) -> str:
        return f"{self.root}/images"

    @property
    def machines(self) -> str:
        return f"{self.root}/machines"

    @property
    def names(self) -> str:
        return f"{self.root}/names"

    @property
    def events(self) -> str:
        return f"{self.root}/events"

    def machine(self, machine_id: str) -> str:
        return f"{self.root}/machines/{machine_id}"

    def runtime(self, machine_id: str) -> str:
        return f"{self.run}/{machine_id}"


def find_paths(root: str = "", run: str = "") -> Paths:
    """Resolve the two roots: argument, then NAGAYA_ROOT / NAGAYA_RUN_DIR, then root's or the user's default.

    A store of its own gets run-time files of its own, so that two stores never meet in /run.
    """
    root = root or os.environ.get("NAGAYA_ROOT", "")
    run = run or os.environ.get("NAGAYA_RUN_DIR", "")
    custom = bool(root)
    if os.geteuid() == 0:
        root = root or "/var/lib/nagaya"
        default_run = "/run/nagaya"
    else:
        data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
        root = root or f"{data}/nagaya"
        default_run = f"{os.environ.get('XDG_RUNTIME_DIR') or f'/tmp/nagaya-{os.getuid()}'}/nagaya"
    for path, option in ((root, "--root"), (run or default_run, "--run-dir")):
        if "\0" in path:
            raise UsageError(f"{option}: a path cannot contain a NUL byte")
    root = os.path.abspath(root)
    return Paths(root, os.path.abspath(run) if run else (f"{root}/run" if custom else default_run))


def cache_directory(name: str) -> str:
    """Where this user's cache of that name is. It may not be there."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "nagaya", name)


def make_directory(path: str, mode: int = 0o700) -> None:
    """`mkdir -p`, with `mode` for every directory that it makes."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(os.path.dirname(path), mode if mode & 0o001 else 0o755)
        make_directory(path, mode)
