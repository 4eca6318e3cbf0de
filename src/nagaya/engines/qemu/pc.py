"""The engine of whole machines: QEMU with a firmware, drives and a screen, and nothing of ours inside.

What an agent is to other machines, the serial console, the power button and the monitor are to these.
"""

from __future__ import annotations

import os
import select
import signal
import stat
from contextlib import ExitStack

from nagaya.engines.base import FEATURES, Booted, BootRequest, Stats
from nagaya.engines.qemu import discs, pc_arguments, rights, screen
from nagaya.engines.qemu.arguments import Card
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.last_words import launch_error
from nagaya.engines.qemu.measures import block_bytes
from nagaya.engines.qemu.monitor import COMMAND_TIMEOUT_S, Monitor, MonitorClosed
from nagaya.engines.qemu.pc_arguments import PcDrive, PcFirmware, PcMachine
from nagaya.engines.qemu.pc_boards import UEFI, PcBoard, find_firmware, find_loader, find_pc_board
from nagaya.engines.vm import child, rules
from nagaya.engines.vm.console import TextLog
from nagaya.errors import HostError, LaunchError, NagayaError, Unsupported, UsageError
from nagaya.kernel import unix
from nagaya.kernel.process import read_usage
from nagaya.model.policy import APPLET
from nagaya.model.spec import Hardware, MachineSpec
from nagaya.net import links, tap
from nagaya.net.plan import LinkPlan
from nagaya.storage.disk_images.chain import open_chain
from nagaya.storage.plan import HardwarePlan

STARTED_WITHIN_S = 30.0
END_WITHIN_S = 10.0  # from being switched off until its last data must be on its disks
CLOSED_TO_ENDED_S = 2.0
KVM = "/dev/kvm"
SCREEN = "screen.sock"  # in the machine's run-time directory: VNC
_HAS = ("pause", "stats", "own-kernel", "other-cpus", "storage")
_WHY = "a whole machine runs a system of its own, with nothing of Nagaya's inside"


class WholeMachineEngine:
    """Boots one whole machine; one instance lives in each supervisor. `type` says what runs its CPUs."""

    rootfs_kind = "hardware"
    capabilities = frozenset(("pause", "stats", "explain", "power", "screen", "discs"))

    def __init__(self, type: str) -> None:
        self.type = type
        self.missing = {feature: rules.MISSING.get(feature, _WHY) for feature in FEATURES if feature not in _HAS}
        self._pid = -1
        self._pidfd = -1
        self._memory_bytes = 0
        self._links: tuple[str, ...] = ()
        self._monitor: Monitor | None = None
        self._log: TextLog | None = None
        self._screen = -1  # listens for viewers

    # -- before a boot

    def check_host(self, *, kernel: str = "") -> None:
        """See `Engine.check_host`: QEMU and qemu-img are what every such machine needs."""
        from nagaya.storage.disk_images.program import find_program

        find_program()

    def find_slowness(self) -> str:
        """See `Engine.find_slowness`."""
        return ""

    def check(self, spec: MachineSpec) -> list[str]:
        """Raise for what could not be booted; answers warnings. Changes nothing."""
        board, hardware = find_pc_board(spec.platform), _hardware(spec)
        _require(board)
        if hardware.firmware == UEFI:
            find_firmware(board)
        else:
            find_loader(board)
        if hardware.compat and not board.vga:
            raise Unsupported(f"--compat is for PCs, and an {board.architecture} machine is none")
        disks = sum(not drive.cdrom for drive in hardware.drives)
        most = pc_arguments.MOST_IDE_DRIVES if hardware.compat else pc_arguments.MOST_DRIVES
        if disks > most or len(hardware.drives) - disks > pc_arguments.MOST_CDS or (
            hardware.compat and len(hardware.drives) > most
        ):  # fmt: skip
            raise UsageError(
                f"a machine has at most {most} {'drives' if hardware.compat else 'disks'}, "
                f"and {pc_arguments.MOST_CDS} CD drives"
            )
        if self.type == "kvm" and board.architecture != os.uname().machine:
            raise Unsupported(
                f"this host's CPU runs no {board.architecture} system", hint="use --type emulated, or another --arch"
            )
        if spec.network == "host":
            raise Unsupported(
                "a virtual machine has a network of its own and cannot use the host's",
                hint="use --network bridge, user or none",
            )
        return []

    # -- boot

    def boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        """Start QEMU. See `Engine.boot`."""
        try:
            return self._boot(request, stack)
        except OSError as error:
            raise HostError.from_os(error, "cannot start the machine") from None

    def _boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        with ExitStack() as failed:
            failed.callback(self._abandon)
            with ExitStack() as local:
                inherited = Inherited(local)
                console, console_number = inherited.connect()
                failed.callback(os.close, console)
                log, log_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                local.callback(os.close, log_end)
                self._log = TextLog(log, f"{request.runtime_dir}/qemu.log")
                machine = self._assemble(request, inherited, local, console_number)
                launch = child.Launch(
                    argv=pc_arguments.plan_pc(machine),
                    descriptors=tuple(inherited.fds),
                    log=log_end,
                    prepare=rights.plan_rights(
                        machine.id,
                        host_network=any(card.tap < 0 for card in machine.cards),
                        groups=_kvm_groups() if machine.kvm else (),
                    ),
                )
                self._pid = child.start(launch)
                self._pidfd = os.pidfd_open(self._pid)
            self._greet()
            self._screen = unix.listen(request.runtime_dir, SCREEN)
            failed.pop_all()
        stack.callback(self._cleanup)
        return Booted(
            pid=self._pid,
            pidfd=os.dup(self._pidfd),
            agent=-1,
            console=console,
            policy=APPLET,
            watch=(
                *((source.fd, self.listen) for source in self._sources()),
                (self._screen, self._admit_viewer),
            ),
            end_timeout_s=END_WITHIN_S,
        )

    def _assemble(self, request: BootRequest, inherited: Inherited, local: ExitStack, console: int) -> PcMachine:
        """Open, and lock, what the machine is made of."""
        spec, plan = request.spec, request.rootfs
        assert isinstance(plan, HardwarePlan)  # our `rootfs_kind`
        hardware, board = _hardware(spec), find_pc_board(spec.platform)
        monitor, monitor_number = inherited.connect()
        self._monitor = Monitor(monitor)
        machine = PcMachine(
            board=board,
            id=spec.id,
            kvm=self.type == "kvm",
            cpus=rules.cpus(spec),
            memory_bytes=rules.memory_bytes(spec),
            compat=hardware.compat,
            firmware=_open_firmware(board, hardware, plan, inherited),
            drives=_open_drives(hardware, plan, inherited, local),
            monitor=monitor_number,
            console=console,
            cards=tuple(_plug(link, request, inherited) for link in request.network.links),
            forward_ssh=hardware.seed is not None,
        )
        self._memory_bytes = machine.memory_bytes
        self._links = tuple(link.host_link for link in request.network.links if link.host_link)
        return machine

    def _greet(self) -> None:
        """Until QEMU has made the machine. Raises `LaunchError` with its last words when it ends instead."""
        assert self._monitor is not None
        try:
            self._monitor.negotiate(STARTED_WITHIN_S)
        except MonitorClosed:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
            raise self._launch_error("QEMU did not start the machine", ended) from None

    def _launch_error(self, message: str, ended: os.waitid_result | None) -> LaunchError:
        assert self._log is not None
        return launch_error(self._log, message, ended)

    # -- while it runs

    def power_down(self) -> None:
        """See `Powered.power_down`."""
        self._command("system_powerdown")

    def quit(self) -> None:
        """See `Powered.quit`. QEMU that gets SIGTERM writes its caches out, and ends."""
        self._signal(signal.SIGTERM)

    def pause(self) -> None:
        self._command("stop")

    def resume(self) -> None:
        self._command("cont")

    def _command(self, name: str, *, descriptor: int = -1, **arguments: object) -> object:
        assert self._monitor is not None
        return self._monitor.command(name, timeout_s=COMMAND_TIMEOUT_S, descriptor=descriptor, **arguments)

    def screenshot(self, format: str) -> bytes:
        """See `Screened.screenshot`."""
        assert self._monitor is not None
        return screen.take_picture(self._monitor, format)

    def press_keys(self, words: tuple[str, ...], text: str) -> None:
        """See `Screened.press_keys`."""
        assert self._monitor is not None
        screen.press(self._monitor, screen.parse_keys(words, text))

    def change_disc(self, number: int, path: str, format: str) -> None:
        """See `DiscChanging.change_disc`."""
        assert self._monitor is not None
        discs.change(self._monitor, number, path, format)

    def find_forwarded(self) -> int:
        """The port of this host's loopback that leads to the machine's ssh; 0 = none does."""
        from nagaya.engines.qemu.measures import forwarded_port

        return forwarded_port(self._command("human-monitor-command", command_line="info usernet"))

    def _admit_viewer(self) -> None:
        """Somebody has connected to the screen's socket."""
        assert self._monitor is not None
        try:
            connection = unix.accept(self._screen)
        except OSError:
            return  # gone again
        try:
            screen.admit(self._monitor, connection)
        except NagayaError:
            return  # QEMU does not want it, or ends: the viewer sees its connection closed
        finally:
            os.close(connection)

    def stats(self) -> Stats:
        """CPU time and memory of QEMU's process, block and network counters of the guest's devices."""
        cpu_ns, resident_bytes = read_usage(self._pid)
        reading = Stats(cpu_ns=cpu_ns, memory_bytes=resident_bytes, memory_limit_bytes=self._memory_bytes)
        read, written = block_bytes(self._command("query-blockstats", query_nodes=False))
        reading = reading._replace(block_read_bytes=read, block_write_bytes=written)
        if self._links:
            sent, received = links.link_bytes(self._links)
            reading = reading._replace(net_rx_bytes=sent, net_tx_bytes=received)
        return reading

    def listen(self) -> None:
        """Take what QEMU and its monitor have said. A QEMU that closes one of them is ending, or is not to live on.

        It closes them last, when its disks are closed: a moment later it has ended, and its status says how.
        """
        for source in self._sources():
            if not source.drain() and not self._ends_within(CLOSED_TO_ENDED_S):
                self.kill()

    def _ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _sources(self) -> list[TextLog | Monitor]:
        return [source for source in (self._log, self._monitor) if source is not None]

    def explain_end(self, ended: os.waitid_result | None) -> NagayaError | None:
        """See `Explaining.explain_end`. That a system switched its machine off needs no explanation."""
        if self._log is None or ended is None or (ended.si_code, ended.si_status) == (os.CLD_KILLED, signal.SIGKILL):
            return None
        how = "ended with status" if ended.si_code == os.CLD_EXITED else "was killed by signal"
        return self._launch_error(f"QEMU {how} {ended.si_status}", ended)

    def kill(self) -> None:
        """SIGKILL to QEMU: pulls the machine's plug."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    def reclaim(self, machine_id: str) -> None:
        """See `Engine.reclaim`. QEMU dies with its supervisor, and its tap device and its locks with QEMU."""

    def _abandon(self) -> None:
        """A boot that failed: nothing runs on."""
        if self._pid > 0:
            os.kill(self._pid, signal.SIGKILL)  # our child, and not reaped: the pid is still its own
            os.waitpid(self._pid, 0)
        self._cleanup()

    def _cleanup(self) -> None:
        for source in self._sources():
            source.drain()
            source.close()
        self._log = self._monitor = None
        if self._screen >= 0:
            os.close(self._screen)
            self._screen = -1
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pid = self._pidfd = -1


def _hardware(spec: MachineSpec) -> Hardware:
    assert spec.hardware is not None  # `engine_of` has looked
    return spec.hardware


def _require(board: PcBoard) -> None:
    """Raise `Unsupported` without QEMU for `board`."""
    places = child.ENVIRONMENT["PATH"].split(":")
    if not any(os.access(f"{place}/{board.program}", os.X_OK) for place in places):
        raise Unsupported(
            f"{board.program} is not installed, and it runs {board.architecture} machines",
            hint=f"as root: apt-get install {board.package}",
            finding="it was looked for in PATH",
        )


def _kvm_groups() -> tuple[int, ...]:
    """The group that may open /dev/kvm, where not everybody may."""
    node = os.stat(KVM)
    return () if node.st_mode & stat.S_IWOTH else (node.st_gid,)


def _open_firmware(board: PcBoard, hardware: Hardware, plan: HardwarePlan, inherited: Inherited) -> PcFirmware:
    if hardware.firmware != UEFI:
        loader = find_loader(board)
        return PcFirmware(loader=inherited.add(os.open(loader, os.O_RDONLY | os.O_CLOEXEC))) if loader else PcFirmware()
    code, _ = find_firmware(board)
    return PcFirmware(
        code=inherited.add(os.open(code, os.O_RDONLY | os.O_CLOEXEC)),
        variables=inherited.add(os.open(plan.firmware_state, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)),
    )


def _open_drives(hardware: Hardware, plan: HardwarePlan, inherited: Inherited, local: ExitStack) -> tuple[PcDrive, ...]:
    """Each image with what lies under it. The locks go when QEMU does, for it has copies of the descriptors."""
    found: list[PcDrive] = []
    group = pc_arguments.FIRST_SET
    order = sorted(range(len(hardware.drives)), key=lambda at: hardware.drives[at].cdrom != hardware.boot_cdrom)
    for number, (drive, path) in enumerate(zip(hardware.drives, plan.paths, strict=True)):
        node, descriptors = None, list[tuple[int, int]]()
        if path:
            chain = open_chain(
                path, local, format=drive.format, writable=not drive.read_only, allowed=plan.backing_places,
                allow_backing=drive.allow_backing,
            )  # fmt: skip
            if any(layer.header.extents for layer in chain.layers):
                raise Unsupported(
                    f"'{path}' is a VMDK in several files, which no machine can use",
                    hint="convert it: nagaya disk convert",
                )
            sets = range(group, group + len(chain.layers))
            group += len(chain.layers)
            descriptors = list(zip(map(inherited.lend, chain.descriptors), sets, strict=True))
            node = chain.node(files=tuple(f"/dev/fdset/{number}" for number in sets))
            if not drive.read_only:
                node["discard"] = node["file"]["discard"] = "unmap"
        name = f"{'cd' if drive.cdrom else 'disk'}{number}"
        found.append(PcDrive(name, node, tuple(descriptors), drive.cdrom, boot_index=1 + order.index(number)))
    return tuple(found)


def _plug(link: LinkPlan, request: BootRequest, inherited: Inherited) -> Card:
    if link.driver == "user":
        return Card(link.mac, ports=request.network.forwards)
    return Card(link.mac, inherited.add(tap.open_link(link)))
