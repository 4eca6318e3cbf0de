"""What a start can begin from, the quickest first: a template that has all but the machine's own, one with a kernel, a boot."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nagaya.engines.base import BootRequest
from nagaya.engines.kvm import saved, template
from nagaya.engines.kvm.known import find_kvm
from nagaya.engines.kvm.template import Mold, Prepared
from nagaya.engines.mount_rules import covers
from nagaya.engines.vm import rules
from nagaya.engines.vm.agent import agent_path
from nagaya.engines.vm.shares import why_not
from nagaya.errors import NagayaError
from nagaya.kernels import cache
from nagaya.model.spec import MachineSpec
from nagaya.protocol.agent import HELLO
from nagaya.protocol.frame import encode
from nagaya.static import Self
from nagaya.storage.disks import is_blank
from nagaya.storage.plan import DiskPlan

BOOT, TEMPLATE, SAVED, MIGRATED = "boot", "template", "saved", "migrated"
_LINE = "console=hvc0 panic=-1"


class Source:
    """`saved` None: a boot. `hello` is what the agent said before the machine was saved, for who listens now.

    `data` is the data disk to begin with, for a machine that has none yet; `mold` is a template's.
    """

    def __init__(
        self,
        origin: str,
        *,
        found: saved.Saved | None = None,
        mold: Mold | None = None,
        hello: bytes = b"",
        data: str = "",
    ) -> None:
        self.origin = origin
        self.saved = found
        self.mold = mold
        self.hello = hello
        self.data = data

    def discard(self) -> None:
        """Remove the template: it cannot be used here."""
        if self.mold is not None:
            template.remove(template.make_id(self.mold.key))

    def close(self) -> None:
        if self.saved is not None:
            self.saved.close()
            self.saved = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def command_line(spec: MachineSpec) -> str:
    """The kernel's arguments that do not come from its devices."""
    return f"{_LINE} {spec.append}".rstrip()


def open_saved(directory: str) -> Source:
    """What `Saving.save` has written. Raises as `saved.read`."""
    return Source(SAVED, found=saved.read(directory))


def find_sources(request: BootRequest) -> Iterator[Source]:
    """Each is the caller's to close. Has the template built that was not there, for the next of its kind."""
    bare = plan_mold(request) if template.is_on() and request.spec.template else None
    if bare is not None:
        prepared = plan_prepared(bare, request)
        wanted = [(mold, template.find(mold)) for mold in (prepared, bare) if mold is not None]
        if not wanted[0][1] and not template.failed_lately(wanted[0][0]):
            from nagaya.engines.kvm.template_build import build_later  # lazy: once for each template

            build_later(wanted[0][0])
        for mold, path in wanted:
            source = _open(mold, path) if path else None
            if source is not None:
                yield source
    yield Source(BOOT)


def _open(mold: Mold, path: str) -> Source | None:
    try:
        found = template.open_template(path, mold)
    except NagayaError:  # this host cannot use it
        template.remove(os.path.basename(path))
        return None
    if found is None:
        return None
    hello = encode(HELLO, 0, bytes.fromhex(found.state["notes"]["hello"]))
    data = f"{path}/{template.DATA}" if mold.prepared is not None else ""
    return Source(TEMPLATE, found=found, mold=mold, hello=hello, data=data)


def plan_mold(request: BootRequest) -> Mold | None:
    """The bare template's; None for a machine that can only boot."""
    spec = request.spec
    links = request.network.links
    if spec.hardware is not None or any(link.name != f"eth{number}" for number, link in enumerate(links)):
        return None
    return Mold(
        kernel=spec.kernel or cache.get_kernel().path, agent=agent_path(), command_line=command_line(spec),
        memory_bytes=rules.memory_bytes(spec), cpus=rules.cpus(spec), cards=tuple("stream" if link.driver == "user" else "tap" for link in links),
        kvm=find_kvm().kind, shares=any(mount.kind == "bind" for mount in request.mounts) and not why_not(),
    )  # fmt: skip


def plan_prepared(bare: Mold, request: BootRequest) -> Mold | None:
    """The prepared template's; None where the machine has been started before, or wants what is not the same for all."""
    spec, disks = request.spec, request.rootfs
    assert isinstance(disks, DiskPlan)
    if request.mounts or spec.sysctls or spec.devices or len(request.network.links) > 1 or rules.is_errand(spec):
        return None
    try:
        fd = os.open(disks.data, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if not is_blank(fd):
            return None
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    return bare._replace(
        prepared=Prepared(
            image=disks.image, data_bytes=size, read_only=spec.read_only or disks.read_only, unmask=spec.security.unmask,
            own_pids=not spec.init, pids=spec.limits.pids,
            files=tuple(path for path, _ in request.etc if not covers(request.mounts, path)), mtu=request.network.links[0].mtu if request.network.links else 0,
            capabilities=rules.plan_policy(spec).capabilities,
        )
    )  # fmt: skip
