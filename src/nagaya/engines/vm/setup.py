"""From a boot request to what the agent of a virtual machine is told: SETUP as data."""

from __future__ import annotations

from nagaya.engines.base import BootRequest
from nagaya.engines.mount_rules import check_target, covers, mount_flags
from nagaya.errors import HostError
from nagaya.kernel.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY
from nagaya.net.plan import LinkPlan
from nagaya.protocol.setup import GuestMount, GuestNetwork, GuestSetup
from nagaya.storage.plan import DiskPlan, MountPlan

ROOT_SERIAL = "root"  # the image's disk, erofs; virtio-blk serial numbers
DATA_SERIAL = "data"  # the machine's own, ext4
AGENT_PORT = "nagaya.agent"  # the virtio console port of the agent

_OPTIONS = {MS_NOSUID: "nosuid", MS_NODEV: "nodev", MS_NOEXEC: "noexec"}


def plan_setup(
    request: BootRequest,
    *,
    time_ns: int,
    entropy: bytes,
    power_off: str,
    virtiofs_tags: tuple[tuple[str, str], ...],
) -> GuestSetup:
    """What the agent is to make of the machine. Pure, but for reading the host files of `request.etc`.

    `virtiofs_tags` has (target, share) for each bind among the request's mounts: the share is a tag, or "tag/path"
    for what lies at that path of one. A bind that is not in it is left out: the engine brings it in another way.
    Raises `UsageError`, and `HostError` when one of those files cannot be read.
    """
    spec = request.spec
    shares = dict(virtiofs_tags)
    layout = request.rootfs
    return GuestSetup(
        hostname=spec.hostname,
        read_only=spec.read_only or (isinstance(layout, DiskPlan) and layout.read_only),
        time_ns=time_ns,
        entropy=entropy,
        files=tuple((path, _content(file)) for path, file in request.etc if not covers(request.mounts, path)),
        mounts=tuple(
            _plan_mount(mount, shares.get(mount.target, ""))
            for mount in request.mounts
            if mount.kind == "tmpfs" or mount.target in shares
        ),
        networks=tuple(plan_link(link) for link in request.network.links),
        sysctls=spec.sysctls,
        unmask=spec.security.unmask,
        power_off=power_off,
        devices=tuple((device.host_path, device.path) for device in spec.devices),
        own_pids=not spec.init,
        pids=spec.limits.pids,
    )


def _plan_mount(mount: MountPlan, share: str) -> GuestMount:
    check_target(mount.target)
    flags = mount_flags(mount)
    return GuestMount(
        kind="tmpfs" if mount.kind == "tmpfs" else "virtiofs",
        source=share,
        target=mount.target,
        read_only=bool(flags & MS_RDONLY),
        options=tuple(name for bit, name in _OPTIONS.items() if flags & bit),
        size_bytes=mount.size_bytes,
        mode=mount.mode,
    )


def plan_link(link: LinkPlan) -> GuestNetwork:
    return GuestNetwork(
        link.mac,
        link.address,
        link.prefix,
        link.gateway,
        link.mtu,
        link.name,
        link.address6,
        link.prefix6,
        link.gateway6,
    )


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise HostError.from_os(error, "cannot read a file of the machine's /etc") from None
