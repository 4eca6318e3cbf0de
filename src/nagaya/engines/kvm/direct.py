"""The engine of whole machines without firmware: our own VMM starts the kernel that is on the machine's first disk.

What is on the disk is read anew at every start, so that a kernel that the system has got meanwhile is the one that runs.
A system that restarts itself goes on with the kernel that it was started with.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial

from nagaya.engines.base import FEATURES, Booted, BootRequest, Stats
from nagaya.engines.kvm import child
from nagaya.engines.kvm.assembly import Hardware
from nagaya.engines.kvm.known import HARDWARE, find_kvm
from nagaya.engines.kvm.machine import Machine
from nagaya.engines.kvm.vmm import Vmm
from nagaya.engines.vm import rules
from nagaya.engines.vm.bounds import Bounds, reclaim
from nagaya.engines.vm.parts import user_id
from nagaya.engines.vm.passt import require_passt, start_passt
from nagaya.errors import Conflict, HostError, NagayaError, RemoteError, Unsupported
from nagaya.kernel import unix
from nagaya.model.policy import APPLET
from nagaya.model.spec import Hardware as Drives
from nagaya.model.spec import MachineSpec, PortMapping
from nagaya.net import ports, tap
from nagaya.net.plan import LinkPlan
from nagaya.storage.disk_images.boot_files import copy_out, find_boot_files, find_debugfs
from nagaya.storage.disk_images.chain import open_chain
from nagaya.storage.plan import HardwarePlan

PLATFORM = "linux/amd64"
MOST_DRIVES = 8
SLOW = "this host's KVM is a software one, on which a kernel that was not made for it takes many minutes to boot"
_SSH = 22
_END_WITHIN_S = 10.0
_HAS = ("pause", "stats", "own-kernel", "storage", "cpuset", "blkio")
_WHY = "a whole machine runs a system of its own, with nothing of Nagaya's inside"


class DirectEngine:
    """Boots one whole machine on our own VMM; one instance lives in each supervisor."""

    type = "kvm"
    rootfs_kind = "hardware"
    capabilities = frozenset(("pause", "stats", "explain", "oom", "power"))

    def __init__(self) -> None:
        self.missing = {feature: rules.MISSING.get(feature, _WHY) for feature in FEATURES if feature not in _HAS}
        self.missing["other-cpus"] = "KVM runs programs for this host's own CPU"
        self._vmm: Vmm | None = None
        self._memory_bytes = 0
        self._links: tuple[str, ...] = ()
        self._drives: tuple[str, ...] = ()
        self._ssh_port = 0
        self._bounds = Bounds()

    # -- before a boot

    def check_host(self, *, kernel: str = "") -> None:
        """See `Engine.check_host`."""
        if os.uname().machine != "x86_64":
            raise Unsupported("machines without firmware run on x86-64 hosts so far", hint="use --firmware uefi")
        find_kvm()
        find_debugfs()

    def find_slowness(self) -> str:
        """See `Engine.find_slowness`."""
        return "" if find_kvm().kind == HARDWARE else SLOW

    def check(self, spec: MachineSpec) -> list[str]:
        """Raise for what could not be booted; answers warnings. Changes nothing."""
        drives = _drives(spec)
        rules.check_append(spec)
        if spec.platform != PLATFORM:
            raise Unsupported(f"KVM on this host runs no system for {spec.platform}", hint="use --type emulated")
        if drives.compat or drives.boot_cdrom:
            raise Unsupported(
                "a machine without firmware has virtio devices, and starts the kernel of its first disk",
                hint="leave --compat and --boot cdrom away, or use --firmware bios or uefi",
            )
        if len(drives.drives) > MOST_DRIVES:
            raise Unsupported(f"a machine without firmware has at most {MOST_DRIVES} drives")
        for drive in drives.drives:
            if not drive.path:
                raise Unsupported("a machine without firmware has no drives for discs", hint="leave --cdrom empty away")
            if drive.format != "raw":
                raise Unsupported(
                    f"a machine without firmware has raw disks, and '{drive.path}' is a {drive.format}",
                    hint="let it have a copy of its own: --disk DISK,clone; or convert it: nagaya disk convert DISK x.raw",
                )
        if drives.drives[0].cdrom:
            raise Unsupported("a machine without firmware starts from a disk", hint="give it a --disk with a system")
        if spec.network == "host":
            raise Unsupported(
                "a virtual machine has a network of its own and cannot use the host's",
                hint="use --network bridge, user or none",
            )
        if spec.network == "user" or (os.geteuid() and spec.network == "bridge"):
            require_passt()
        return [*rules.warn_of_limits(spec), *([SLOW] if find_kvm().kind != HARDWARE else [])]

    # -- boot

    def boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        """Start the VMM. See `Engine.boot`."""
        try:
            self._bounds.make(request.spec, request.runtime_dir, stack, translates=False)
            with ExitStack() as failed, ExitStack() as local:
                console, console_end = unix.socket_pair()
                failed.callback(os.close, console)
                local.callback(os.close, console_end)
                os.set_blocking(console, False)
                os.set_blocking(console_end, False)
                vmm = self._vmm = Vmm(f"{request.runtime_dir}/vmm.log", local, self._bounds)
                failed.callback(self._close, reap=True)
                vmm.start(self._plan(request, vmm, console_end, local))
                local.close()  # the child's ends are the child's alone now: each of us hears when the other ends
                vmm.greet()
                failed.pop_all()
        except OSError as error:
            raise HostError.from_os(error, "cannot start the machine") from None
        stack.callback(self._close)
        return Booted(
            pid=vmm.pid, pidfd=os.dup(vmm.pidfd), agent=-1, console=console, policy=APPLET,
            warnings=(*self.check(request.spec), *self._bounds.warnings), helpers=tuple(vmm.helpers), watch=((vmm.log.fd, self._listen),),
            end_timeout_s=_END_WITHIN_S,
        )  # fmt: skip

    def _plan(self, request: BootRequest, vmm: Vmm, console: int, local: ExitStack) -> child.Plan:
        """Open, and lock, what the machine is made of; what the child makes of it."""
        spec, plan = request.spec, request.rootfs
        assert isinstance(plan, HardwarePlan)  # our `rootfs_kind`
        disks = tuple(_open_drives(spec, plan, local))
        kernel, initrd, root = _take_kernel(disks[0][0], local)
        self._memory_bytes = rules.memory_bytes(spec)
        self._links = tuple(link.host_link for link in request.network.links if link.host_link)
        self._drives = tuple(f"disk{number}" for number in range(len(disks)))
        cards = tuple((self._plug(link, request, vmm, local), link) for link in request.network.links)
        hardware = Hardware(
            kernel=f"/proc/self/fd/{kernel}", initrd=f"/proc/self/fd/{initrd}",
            command_line=f"root=UUID={root} ro console=ttyS0,115200 {spec.append}".rstrip(), memory_bytes=self._memory_bytes, cpus=rules.cpus(spec),
            serial_fd=console, serial_input_fd=console, quiet=False,
        )  # fmt: skip
        return child.Plan(
            assemble=partial(_assemble, hardware, disks, cards),
            control=vmm.control_end,
            kept=(console, kernel, initrd, *(fd for fd, _ in (*disks, *cards))),
            log=vmm.log_end,
            enter=self._bounds.enter,
            id=user_id(spec.id) if os.geteuid() == 0 else -1,
            reboots=True,
        )

    def _plug(self, link: LinkPlan, request: BootRequest, vmm: Vmm, local: ExitStack) -> int:
        """What a network card is plugged into."""
        if link.driver != "user":
            fd = tap.open_link(link)
            local.callback(os.close, fd)
            return fd
        network = request.network
        if _drives(request.spec).seed is not None:  # passt listens for what comes to its ssh server
            held = ports.hold((PortMapping("127.0.0.1", 0, _SSH),))
            ports.release(held)
            self._ssh_port = held[0].mapping.host_port
            network = network._replace(forwards=(*network.forwards, held[0].mapping))
        passt = start_passt(link, network, request.spec.id, vmm.log_end, local, enter=self._bounds.enter)
        vmm.helpers.append(passt.pid)
        return passt.socket

    # -- while it runs

    def power_down(self) -> None:
        """See `Powered.power_down`."""
        self._press("press")

    def quit(self) -> None:
        """See `Powered.quit`. What its system has written is with the host's kernel, which brings it to the disk."""
        self._press("end")

    def _press(self, what: str) -> None:
        try:
            self._ask(what)
        except (Conflict, RemoteError):
            return  # it is ending already: its pidfd tells

    def pause(self) -> None:
        self._running().pause()

    def resume(self) -> None:
        self._ask("resume")

    def _ask(self, what: str) -> dict[str, object]:
        return self._running().ask(what)

    def _running(self) -> Vmm:
        if self._vmm is None:
            raise RemoteError("the machine has ended")
        return self._vmm

    def find_forwarded(self) -> int:
        """The port of this host's loopback that leads to the machine's ssh; 0 = none does."""
        return self._ssh_port

    def stats(self) -> Stats:
        """See `Vmm.read_stats`."""
        if self._vmm is None:
            raise RemoteError("the machine has ended")
        return self._vmm.read_stats(self._drives, self._links, memory_bytes=self._memory_bytes)

    def _listen(self) -> None:
        """Take what the VMM has said. One that closes its log has ended, or is broken."""
        if self._vmm is not None and not self._vmm.log.drain():
            self._vmm.kill()

    def explain_end(self, ended: os.waitid_result | None) -> NagayaError | None:
        """See `Explaining.explain_end`."""
        reason = self._vmm.last_words() if self._vmm is not None else ""
        return RemoteError(f"the machine ended: {reason}") if reason else None

    def kill(self) -> None:
        """Pull the machine's plug."""
        if self._vmm is not None:
            self._vmm.kill()

    def reclaim(self, machine_id: str, runtime_dir: str) -> None:
        """See `Engine.reclaim`. The VMM dies with its supervisor, and its tap device and its locks with it."""
        reclaim(machine_id, runtime_dir)

    def oom_killed(self) -> bool:
        """See `OomAware.oom_killed`."""
        return self._bounds.oom_killed()

    def _close(self, *, reap: bool = False) -> None:
        vmm, self._vmm = self._vmm, None
        if vmm is not None:
            vmm.close(reap=reap)


def _drives(spec: MachineSpec) -> Drives:
    assert spec.hardware is not None
    return spec.hardware


def _open_drives(spec: MachineSpec, plan: HardwarePlan, local: ExitStack) -> list[tuple[int, bool]]:
    """(descriptor, whether it is only read) of each drive. The locks go when the VMM does, for it has the descriptors."""
    found = []
    for drive, path in zip(_drives(spec).drives, plan.paths, strict=True):
        chain = open_chain(path, local, format=drive.format, writable=not drive.read_only)
        found.append((chain.top.fd, drive.read_only))
    return found


def _take_kernel(disk: int, local: ExitStack) -> tuple[int, int, str]:
    """Kernel and initramfs as memory files, which the VMM can open as another user; the root's UUID."""
    found = find_boot_files(disk, os.lseek(disk, 0, os.SEEK_END))
    files = []
    for path in (found.kernel, found.initramfs):
        fd = copy_out(disk, found.partition, path)
        local.callback(os.close, fd)
        files.append(fd)
    return files[0], files[1], found.root


def _assemble(
    hardware: Hardware, disks: tuple[tuple[int, bool], ...], cards: tuple[tuple[int, LinkPlan], ...]
) -> Machine:
    """In the child: the devices in their order, and the machine. The descriptors become theirs."""
    from nagaya.virtio.apart import DeviceProcess
    from nagaya.virtio.balloon import Balloon
    from nagaya.virtio.blk import Blk
    from nagaya.virtio.device import Device
    from nagaya.virtio.rng import Rng

    drives = tuple(
        Blk(f"disk{number}", f"disk{number}", read_only=read_only, serial=f"disk{number}", fd=fd)
        for number, (fd, read_only) in enumerate(disks)
    )
    apart = DeviceProcess(drives)
    devices: list[Device] = [*apart.devices, Rng("rng"), Balloon("balloon")]
    for fd, link in cards:
        mac = bytes.fromhex(link.mac.replace(":", ""))
        if link.driver == "user":
            from nagaya.virtio.net import Net
            from nagaya.virtio.net_link import Stream

            devices.append(Net(link.name, Stream(fd), mac=mac, mtu=link.mtu))
        else:
            from nagaya.virtio.vhost_net import make_tap_card

            devices.append(make_tap_card(link.name, fd, mac=mac, mtu=link.mtu))
    return Machine(hardware, tuple(devices), apart=apart)
