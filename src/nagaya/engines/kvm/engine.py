"""The kvm engine's supervisor side: plan, fork the machine's process, shake hands, and later pause, measure, kill."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from functools import partial

from nagaya.engines.base import Booted, BootRequest, Stats
from nagaya.engines.kvm import child, saved
from nagaya.engines.kvm.assembly import Hardware
from nagaya.engines.kvm.known import PVM, find_kvm
from nagaya.engines.kvm.machine import Machine
from nagaya.engines.kvm.sources import MIGRATED, Source, command_line, find_sources, open_saved
from nagaya.engines.kvm.vmm import Vmm
from nagaya.engines.vm import rules
from nagaya.engines.vm.agent import agent_path
from nagaya.engines.vm.bounds import Bounds, reclaim
from nagaya.engines.vm.console import TextLog
from nagaya.engines.vm.copies import plan_copies
from nagaya.engines.vm.parts import open_data, open_initramfs, user_id
from nagaya.engines.vm.setup import AGENT_PORT, DATA_SERIAL, ROOT_SERIAL, plan_setup
from nagaya.engines.vm.shares import TAG as SHARES_TAG
from nagaya.engines.vm.shares import Shares, start_shares
from nagaya.errors import HostError, IntegrityError, NotFound, RemoteError, Unsupported
from nagaya.kernel import unix
from nagaya.kernels import cache
from nagaya.model.spec import MachineSpec
from nagaya.net import tap
from nagaya.net.plan import LinkPlan
from nagaya.protocol.setup import setup_payload
from nagaya.static import Any
from nagaya.storage.disks import copy_data_disk
from nagaya.storage.plan import DiskPlan, RootfsPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.kvm.saved import Saved
    from nagaya.engines.kvm.writing import Writing
    from nagaya.virtio.blk import Blk

PLATFORM = "linux/amd64"
PROGRAM_WITHIN_S = 120.0  # a software KVM boots a kernel in 10 to 20 s
END_WITHIN_S = 30.0
ENTROPY_BYTES = 64
_FIRST_WORD_BYTES = 64 << 10  # what a new socket takes at once
_POWER_OFF = "port"  # without ACPI: a kernel that is ours needs none, and reading its tables takes time


class KvmEngine:
    """Boots one machine on our own VMM; one instance lives in each supervisor."""

    type = "kvm"
    rootfs_kind = "disk"
    capabilities = frozenset(
        (
            "pause",
            "stats",
            "oom",
            "offline",
            "memory",
            "save-behind",
            "disk-log",
            "backing",
            "replug",
            "fork",
            "migrate",
            "post-copy",
        )
    )
    missing = rules.MISSING | {"other-cpus": "KVM runs programs for this host's own CPU"}

    def __init__(self) -> None:
        self._vmm: Vmm | None = None
        self._memory_bytes = 0
        self._links: tuple[str, ...] = ()
        self._console: TextLog | None = None
        self._bounds = Bounds()

    # -- before a boot

    def check_host(self, *, kernel: str = "") -> None:
        """See `Engine.check_host`."""
        if os.uname().machine != "x86_64":
            raise Unsupported("machines of type 'kvm' run on x86-64 hosts so far", hint="use --type emulated")
        find_kvm()
        if not kernel:
            try:
                cache.get_kernel()
            except NotFound as missing:
                raise Unsupported(missing.message, hint=missing.hint) from None
        if not os.access(agent_path(), os.R_OK):
            raise Unsupported(
                f"the guest agent is not built ({agent_path()})", hint="run 'make agent', or install the package again"
            )

    def preload(self) -> None:
        """See `Preloading.preload`."""
        from nagaya.engines.kvm import cpu_state, devices, pvm
        from nagaya.virtio import balloon, blk, console, mmio, net, net_link, rng, vhost_net

        del cpu_state, devices, pvm, balloon, blk, console, mmio, net, net_link, rng, vhost_net

    def find_slowness(self) -> str:
        """See `Engine.find_slowness`."""
        from nagaya.engines.kvm.speed import runs_well

        return "" if runs_well() else "this host's KVM is a software one, and the guest kernel is not made for it"

    def check(self, spec: MachineSpec) -> list[str]:
        """Raise for what could not be booted; answers warnings. Changes nothing."""
        if spec.platform and spec.platform != PLATFORM:
            raise Unsupported(
                f"the image is for {spec.platform}, and this host's CPU runs {PLATFORM}", hint="use --type emulated"
            )
        if spec.network == "user" or (os.geteuid() and spec.network == "bridge"):
            from nagaya.engines.vm.passt import require_passt  # lazy: most machines have a bridge, or nothing

            require_passt()
        return rules.check_spec(spec)

    # -- boot

    def boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        """Start the VMM. See `Engine.boot`."""
        try:
            self._bounds.make(request.spec, request.runtime_dir, stack, translates=False)
            if request.incoming is not None:
                return self._boot(request, Source(MIGRATED), stack)
            if request.saved:
                with open_saved(request.saved) as source:
                    return self._boot(request, source, stack)
            with ExitStack() as local:
                for source in find_sources(request):
                    local.callback(source.close)
                    try:
                        return self._boot(request, source, stack)
                    except (IntegrityError, Unsupported):
                        if source.mold is None:
                            raise
                        source.discard()  # it was made by another version, or on another CPU
            raise AssertionError("a machine can always be booted")
        except OSError as error:
            raise HostError.from_os(error, "cannot start the machine") from None

    def _boot(self, request: BootRequest, source: Source, stack: ExitStack) -> Booted:
        spec = request.spec
        with ExitStack() as failed:
            failed.callback(self._close, reap=True)
            with ExitStack() as local:
                agent, theirs = _connect(local)
                failed.callback(os.close, agent)
                vmm = self._vmm = Vmm(f"{request.runtime_dir}/vmm.log", local, self._bounds)
                shares = _share(request, vmm, local, self._bounds)
                plan = self._plan(request, source, vmm, theirs, shares, local)
                setup = plan_setup(
                    request, time_ns=time.time_ns(), entropy=os.urandom(ENTROPY_BYTES), power_off=_POWER_OFF,
                    virtiofs_tags=shares.tags if shares is not None else (),
                )  # fmt: skip
                payload = setup_payload(setup)
                told = bool(source.hello) and len(payload) < _FIRST_WORD_BYTES
                if source.hello:
                    os.write(theirs, source.hello)  # said when the template was made: it will not say so again
                if told:
                    plan = plan._replace(first_word=child.FirstWord(agent, payload), kept=(*plan.kept, agent))
                vmm.start(plan)
            # The child's ends are the child's alone now: each of us hears when the other ends.
            vmm.greet()
            failed.pop_all()
        stack.callback(self._close)
        return Booted(
            pid=vmm.pid, pidfd=os.dup(vmm.pidfd), agent=agent, policy=rules.plan_policy(spec),
            warnings=(*rules.check_spec(spec), *self._bounds.warnings), helpers=tuple(vmm.helpers), setup=payload, told=told,
            copies=plan_copies(request.mounts) if shares is None and not request.saved and not request.incoming else (), origin=source.origin,
            watch=tuple((source.fd, self._listen) for source in self._logs()),
            start_timeout_s=PROGRAM_WITHIN_S, end_timeout_s=END_WITHIN_S,
        )  # fmt: skip

    def _plan(
        self, request: BootRequest, source: Source, vmm: Vmm, agent: int, shares: Shares | None, local: ExitStack
    ) -> child.Plan:
        """Open what the machine is made of; what the child makes of it."""
        spec, disks = request.spec, request.rootfs
        assert isinstance(disks, DiskPlan)  # our `rootfs_kind`
        console, console_end = _connect(local)
        self._console = TextLog(console, f"{request.runtime_dir}/console.log")
        daemon = shares.socket if shares is not None else -1
        bare = json.loads(request.incoming.described) if request.incoming is not None else None
        data = _held(open_data(disks, form=not source.data and bare is None), local)
        if source.data:
            copy_data_disk(source.data, data)
        backing = (
            _held(os.open(disks.backing, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), local) if disks.backing else -1
        )
        initrd = _held(open_initramfs(), local) if source.saved is None and bare is None else -1
        memory = source.saved.fds if source.saved is not None else ()
        self._links = tuple(link.host_link for link in request.network.links if link.host_link)
        links = tuple((self._plug(link, request, vmm, local), link) for link in request.network.links)
        self._memory_bytes = rules.memory_bytes(spec)
        hardware = Hardware(
            kernel=spec.kernel or cache.get_kernel().path, initrd=f"/proc/self/fd/{initrd}" if initrd >= 0 else None,
            command_line=command_line(spec),
            memory_bytes=self._memory_bytes, cpus=rules.cpus(spec), acpi=False,
        )  # fmt: skip
        assemble = partial(
            _assemble, hardware, disks, data=data, backing=backing, agent=agent, console=console_end, links=links, daemon=daemon,
            saved=source.saved, bare=bare,
        )  # fmt: skip
        return child.Plan(
            assemble=assemble, control=vmm.control_end,
            kept=tuple(fd for fd in (agent, console_end, data, backing, initrd, daemon, *memory, *(fd for fd, _ in links)) if fd >= 0),
            log=vmm.log_end, enter=self._bounds.enter,
            id=user_id(spec.id) if os.geteuid() == 0 else -1, incoming=request.incoming,
        )  # fmt: skip

    def _plug(self, plan: LinkPlan, request: BootRequest, vmm: Vmm, local: ExitStack) -> int:
        """What a network card of the machine's is plugged into."""
        if plan.driver == "user":
            from nagaya.engines.vm.passt import start_passt

            link = start_passt(
                plan, request.network, request.spec.id, vmm.log_end, local, enter=self._bounds.enter
            )  # fmt: skip
            vmm.helpers.append(link.pid)
            return link.socket
        return _held(tap.open_link(plan), local)

    # -- while it runs

    def pause(self) -> None:
        self._running().pause()

    def resume(self) -> None:
        self._ask("resume")

    def check_saved(self, spec: MachineSpec, directory: str) -> None:
        """See `Saving.check_saved`."""
        from nagaya.engines.kvm.assembly import check_host  # lazy: a start looks at it in the VMM's process

        found = saved.read(directory, check_memory=False)
        try:
            hardware = Hardware("", memory_bytes=rules.memory_bytes(spec), cpus=rules.cpus(spec), acpi=False)
            check_host(found.state, hardware, software_kvm=find_kvm().kind == PVM)
        finally:
            found.close()

    def save(self, directory: str) -> None:
        """See `Saving.save`."""
        with self.begin_save(directory) as writing:
            writing.finish()

    def begin_save(self, directory: str, *, base: str = "") -> Writing:
        """See `SavingBehind.begin_save`."""
        from nagaya.engines.kvm.writing import Writing  # lazy: most machines are never saved

        self._bounds.make_room(directory, self._memory_bytes)
        return Writing(directory, base, lambda fds, details: self._ask("save", fds=fds, **details))

    def find_base(self, directory: str) -> str:
        """See `SavingBehind.find_base`."""
        return saved.find_base(directory)

    def fold_base(self, directory: str, target: str) -> None:
        """See `SavingBehind.fold_base`."""
        try:
            saved.fold_base(directory, target)
        except OSError as error:
            raise HostError.from_os(error, "cannot merge saved memory") from None

    def log_disk(self, on: bool) -> None:
        """See `DiskLogging.log_disk`."""
        self._ask("log-disk", disk=DATA_SERIAL, on=on)

    def take_disk_log(self) -> list[tuple[int, int]]:
        """See `DiskLogging.take_disk_log`."""
        return [(offset, size) for offset, size in self._ask("take-disk-log", disk=DATA_SERIAL)["runs"]]

    def describe(self) -> str:
        """See `Migrating.describe`."""
        return json.dumps(self._ask("describe"))

    def check_described(self, spec: MachineSpec, described: str) -> None:
        """See `Migrating.check_described`."""
        from nagaya.engines.kvm.assembly import check_host

        if spec.mounts and any(mount.kind != "tmpfs" for mount in spec.mounts):
            raise Unsupported(
                "a machine with volumes or directories of its host cannot be migrated",
                hint="copy what is in them: nagaya cp; what virtiofsd knows of a mount is its own, and stays there",
            )
        hardware = Hardware("", memory_bytes=rules.memory_bytes(spec), cpus=rules.cpus(spec), acpi=False)
        try:
            check_host(json.loads(described), hardware, software_kvm=find_kvm().kind == PVM)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"what the machine is said to be made of makes no sense: {error}") from None

    def leave(self, stream: tuple[int, int], report_fd: int, *, max_downtime_ms: int, post_copy: bool) -> None:
        """See `Migrating.leave`."""
        terms = {"max_downtime_ms": max_downtime_ms, "post_copy": post_copy}
        self._ask("leave", fds=(*stream, report_fd), terms=terms)

    def recover(self) -> bool:
        """See `Migrating.recover`: a thread of the machine's own process does it."""
        return False

    def replug(self, link: LinkPlan) -> None:
        """See `Replugging.replug`."""
        from nagaya.engines.vm import replugging  # lazy: rare

        replugging.replug(link)

    def plan_renewal(self, links: tuple[LinkPlan, ...], files: tuple[tuple[str, bytes, bytes], ...]) -> bytes:
        """See `Replugging.plan_renewal`."""
        from nagaya.engines.vm import replugging  # lazy: as above

        return replugging.plan_renewal(links, files)

    def stats(self) -> Stats:
        """See `Vmm.read_stats`."""
        return self._running().read_stats((ROOT_SERIAL, DATA_SERIAL), self._links, memory_bytes=self._memory_bytes)

    def _listen(self) -> None:
        """Take what the guest's console and the VMM have said. A VMM that closes one of them has ended, or is broken."""
        for source in self._logs():
            if not source.drain():
                self.kill()

    def _logs(self) -> list[TextLog]:
        log = self._vmm.log if self._vmm is not None else None
        return [source for source in (self._console, log) if source is not None]

    def kill(self) -> None:
        """Pull the machine's plug."""
        if self._vmm is not None:
            self._vmm.kill()

    def start_applet(
        self,
        rootfs: RootfsPlan | DiskPlan,
        argv: tuple[str, ...],
        stdin: int,
        stdout: int,
        stderr: int,
        *,
        data_disk: bool = False,
    ) -> int:
        """See `Offline.start_applet`."""
        from nagaya.engines.vm.offline import start_applet  # lazy: only who works on a stopped machine

        assert isinstance(rootfs, DiskPlan)  # our `rootfs_kind`
        return start_applet(self, rootfs, argv, stdin, stdout, stderr, data_disk=data_disk)

    def reclaim(self, machine_id: str, runtime_dir: str) -> None:
        """See `Engine.reclaim`. The VMM dies with its supervisor, and its tap device with it."""
        reclaim(machine_id, runtime_dir)

    def oom_killed(self) -> bool:
        """See `OomAware.oom_killed`."""
        return self._bounds.oom_killed()

    def _ask(self, what: str, *, fds: tuple[int, ...] = (), **details: object) -> dict[str, Any]:
        return self._running().ask(what, fds=fds, **details)

    def _running(self) -> Vmm:
        if self._vmm is None:
            raise RemoteError("the machine's VMM has ended")
        return self._vmm

    # -- after it

    def _close(self, *, reap: bool = False) -> None:
        """`reap`: a boot failed, and nothing is to run on."""
        console, self._console = self._console, None
        if console is not None:
            console.drain()
            console.close()
        vmm, self._vmm = self._vmm, None
        if vmm is not None:
            vmm.close(reap=reap)


def _share(request: BootRequest, vmm: Vmm, local: ExitStack, bounds: Bounds) -> Shares | None:
    """A virtiofsd for the machine's mounts, which writes to the VMM's log too."""
    shares = start_shares(request.mounts, request.runtime_dir, vmm.log_end, local, enter=bounds.enter)
    if shares is not None:
        vmm.helpers.append(shares.pid)
    return shares


def _connect(local: ExitStack) -> tuple[int, int]:
    """A stream socket to the child: (our end, the child's, which is closed here by `local`)."""
    ours, theirs = unix.socket_pair()
    local.callback(os.close, theirs)
    os.set_blocking(ours, False)
    os.set_blocking(theirs, False)
    return ours, theirs


def _held(fd: int, local: ExitStack) -> int:
    local.callback(os.close, fd)
    return fd


def _assemble(
    hardware: Hardware, disks: DiskPlan, *, data: int, backing: int, agent: int, console: int, links: tuple[tuple[int, LinkPlan], ...],
    daemon: int, saved: Saved | None, bare: dict[str, Any] | None,
) -> Machine:  # fmt: skip
    """In the child: the devices in their order, and the machine. The descriptors become theirs."""
    from nagaya.engines.kvm.devices import SHARES, card_name, plan_devices
    from nagaya.virtio.blk import Blk
    from nagaya.virtio.console import Port

    ports = (
        Port("console", console=True, input_fd=console, output_fd=console),
        Port(AGENT_PORT, input_fd=agent, output_fd=agent),
    )
    drives = (
        Blk(ROOT_SERIAL, disks.image, read_only=True, serial=ROOT_SERIAL),
        _open_data_disk(data, backing),
    )
    # A machine that goes on from saved memory has it copy-on-write, and so for its own process alone: its disks are served
    # by threads of that. Where another process has to have the memory (virtiofsd), all of it is copied at the start.
    apart = None
    if (saved is None and bare is None) or daemon >= 0:
        from nagaya.virtio.apart import DeviceProcess

        apart = DeviceProcess(drives)
    devices = plan_devices(ports, apart.devices if apart is not None else drives)
    for number, (fd, link) in enumerate(links):
        mac = bytes.fromhex(link.mac.replace(":", ""))
        name = card_name(number)
        if link.driver == "user":
            from nagaya.virtio.net import Net
            from nagaya.virtio.net_link import Stream

            devices.append(Net(name, Stream(fd), mac=mac, mtu=link.mtu))
        else:
            from nagaya.virtio.vhost_net import make_tap_card

            devices.append(make_tap_card(name, fd, mac=mac, mtu=link.mtu))
    if daemon >= 0:
        from nagaya.virtio.fs import FileSystem
        from nagaya.virtio.vhost_user import VhostUser

        connection = VhostUser(daemon)
        connection.greet()
        devices.append(FileSystem(SHARES, connection, tag=SHARES_TAG))
    return Machine(hardware, tuple(devices), apart=apart, saved=saved, bare=bare)


def _open_data_disk(data: int, backing: int) -> Blk:
    from nagaya.virtio.blk import Blk

    path = f"/proc/self/fd/{data}"
    if backing < 0:
        return Blk(DATA_SERIAL, path, serial=DATA_SERIAL)
    from nagaya.virtio.backed_blk import BackedBlk  # lazy: few stand on a backing file

    return BackedBlk(DATA_SERIAL, path, backing, serial=DATA_SERIAL)
