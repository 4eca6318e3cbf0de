"""What a virtual machine gets instead of volumes where nothing can share them: their content, copied in at each start."""

from __future__ import annotations

import os
import stat

from nagaya.engines.base import Copy
from nagaya.errors import UsageError
from nagaya.model.spec import MachineSpec
from nagaya.storage.plan import MountPlan


def warn_of_copies(spec: MachineSpec, reason: str) -> list[str]:
    """One sentence for a machine whose volumes are copied for `reason`; none without volumes, or without a reason.

    Raises `UsageError` for a machine that has no place for copies.
    """
    targets = [mount.target for mount in spec.mounts if mount.kind != "tmpfs"]
    if not targets or not reason:
        return []
    if spec.read_only:
        raise UsageError(
            f"a read-only machine has no place for a copy of its volumes, and {reason}",
            hint="leave --read-only out, or use --type container",
        )
    which = f"{targets[0]} is a copy" if len(targets) == 1 else f"{', '.join(targets)} are copies"
    return [f"{which}, brought up to date at each start, and what the machine writes there stays in it: {reason}"]


def plan_copies(mounts: tuple[MountPlan, ...]) -> tuple[Copy, ...]:
    """The binds among `mounts`, parents first as they are there. Raises `OSError` for a source that is gone."""
    return tuple(
        Copy(
            bind.source, bind.target, is_directory=stat.S_ISDIR(os.stat(bind.source).st_mode), read_only=bind.read_only
        )
        for bind in mounts
        if bind.kind == "bind"
    )
