"""The engine of whole machines: QEMU with a firmware, drives and a screen, and nothing of ours inside.

What an agent is to other machines, the serial console, the power button and the monitor are to these.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack

from nagaya.engines.base import FEATURES, Booted, BootRequest, Stats
from nagaya.engines.qemu import discs, guest_agent, hotplug_cpus, pc_arguments, plugging, rights, saved, screen
from nagaya.engines.qemu.guest_agent import GuestAgent
from nagaya.engines.qemu.host_pci import PciDevice, check_pinning, find_pci
from nagaya.engines.qemu.host_usb import find_usb
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.monitor import MonitorClosed
from nagaya.engines.qemu.pc_arguments import PcMachine
from nagaya.engines.qemu.pc_boards import UEFI, find_firmware, find_loader, find_pc_board, most_cpus
from nagaya.engines.qemu.pc_parts import (
    kvm_groups,
    open_drives,
    open_firmware,
    open_kernel,
    open_usb,
    plug_in,
    require_program,
    take_pci,
)
from nagaya.engines.qemu.process import QemuProcess
from nagaya.engines.qemu.tpm import require_tpm, start_tpm
from nagaya.engines.vm import child, rules
from nagaya.engines.vm.bounds import reclaim
from nagaya.errors import HostError, NagayaError, RemoteError, Unsupported, UsageError
from nagaya.kernel import unix
from nagaya.model.policy import APPLET
from nagaya.model.spec import Drive, Hardware, Limits, MachineSpec
from nagaya.net.plan import LinkPlan
from nagaya.storage.plan import HardwarePlan

END_WITHIN_S = 10.0  # from being switched off until its last data must be on its disks
CLOSED_TO_ENDED_S = 10.0  # it gives its guest's memory back; one that is killed before its end has no status to tell
SCREEN = "screen.sock"  # in the machine's run-time directory: VNC
_HAS = (
    "pause", "memory", "stats", "limits", "network-connect", "own-kernel", "other-cpus", "storage", "cpuset", "blkio",
)  # fmt: skip
_WHY = "a whole machine runs a system of its own, with nothing of Nagaya's inside"


class WholeMachineEngine:
    """Boots one whole machine; one instance lives in each supervisor. `type` says what runs its CPUs."""

    rootfs_kind = "hardware"
    capabilities = frozenset(
        (
            "pause",
            "stats",
            "explain",
            "oom",
            "power",
            "screen",
            "discs",
            "disks",
            "plug",
            "limits",
            "guest-agent",
            "memory",
        )
    )

    def __init__(self, type: str) -> None:
        self.type = type
        self.missing = {feature: rules.MISSING.get(feature, _WHY) for feature in FEATURES if feature not in _HAS}
        self._qemu = QemuProcess()
        self._guest: GuestAgent | None = None
        self._pci: tuple[PciDevice, ...] = ()
        self._spec: MachineSpec | None = None
        self._drives: tuple[Drive, ...] = ()  # as they are by now
        self._compat = False
        self._ports: dict[str, int] = {}  # MAC address -> port of its card
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
        require_program(board)
        if hardware.firmware == UEFI:
            find_firmware(board, secure=hardware.secure_boot)
        else:
            find_loader(board)
        if hardware.secure_boot and (hardware.firmware != UEFI or hardware.compat):
            raise UsageError("secure boot is UEFI's, of a machine without --compat", hint="use --firmware uefi")
        if hardware.tpm:
            require_tpm(board)
        for text in hardware.usb:
            find_usb(text)
        if hardware.pci:
            find_pci(hardware.pci)
            check_pinning(rules.memory_bytes(spec))
        if hardware.compat and not board.vga:
            raise Unsupported(f"--compat is for PCs, and an {board.architecture} machine is none")
        if hardware.compat and any(drive.read_only and not drive.cdrom for drive in hardware.drives):
            raise Unsupported(
                "an IDE disk cannot be only read", hint="use --disk DISK,clone instead of ,ro, or leave --compat away"
            )
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
        return rules.warn_of_limits(spec)

    # -- boot

    def boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        """Start QEMU. See `Engine.boot`."""
        try:
            return self._boot(request, stack)
        except OSError as error:
            raise HostError.from_os(error, "cannot start the machine") from None

    def _boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        self._qemu.bounds.make(
            _as_started(request.spec, request.saved), request.runtime_dir, stack, translates=self.type != "kvm"
        )
        with ExitStack() as failed:
            failed.callback(self._abandon)
            with ExitStack() as local:
                inherited = Inherited(local)
                console, console_number = inherited.connect()
                failed.callback(os.close, console)
                log_end = self._qemu.open_log(request.runtime_dir)
                local.callback(os.close, log_end)
                machine = self._assemble(request, inherited, local, console_number)
                if _hardware(request.spec).tpm:
                    machine = machine._replace(tpm=self._add_tpm(request, log_end, inherited))
                launch = child.Launch(
                    argv=pc_arguments.plan_pc(machine),
                    descriptors=tuple(inherited.fds),
                    log=log_end,
                    enter=self._qemu.bounds.enter,
                    prepare=rights.plan_rights(
                        machine.id,
                        host_network=any(card.tap < 0 for card in machine.cards),
                        groups=kvm_groups() if machine.kvm else (),
                        pci=self._pci,
                        memory_bytes=machine.memory_bytes,
                    ),
                )
                self._qemu.start(launch)
            self._qemu.greet()
            if request.saved:
                saved.go_on(self._qemu, self._describe(request.spec), request.saved)
                self._set_clock()
            self._screen = unix.listen(request.runtime_dir, SCREEN)
            failed.pop_all()
        stack.callback(self._cleanup)
        return Booted(
            pid=self._qemu.pid,
            pidfd=os.dup(self._qemu.pidfd),
            agent=-1,
            console=console,
            policy=APPLET,
            warnings=self._qemu.bounds.warnings,
            watch=(
                *((source.fd, self.listen) for source in self._qemu.sources()),
                (self._screen, self._admit_viewer),
            ),
            end_timeout_s=END_WITHIN_S,
        )

    def _assemble(self, request: BootRequest, inherited: Inherited, local: ExitStack, console: int) -> PcMachine:
        """Open, and lock, what the machine is made of."""
        spec, plan = request.spec, request.rootfs
        assert isinstance(plan, HardwarePlan)  # our `rootfs_kind`
        hardware, board = _hardware(spec), find_pc_board(spec.platform)
        guest = -1
        self._pci = take_pci(hardware)
        if not hardware.compat:
            ours, guest = inherited.connect()
            self._guest = GuestAgent(ours)
        machine = PcMachine(
            board=board,
            id=spec.id,
            kvm=self.type == "kvm",
            cpus=rules.cpus(spec),
            memory_bytes=rules.memory_bytes(_as_started(spec, request.saved)),
            compat=hardware.compat,
            firmware=open_firmware(board, hardware, plan, inherited),
            kernel=open_kernel(plan, inherited),
            drives=open_drives(hardware, plan, inherited, local),
            monitor=self._qemu.open_monitor(inherited),
            console=console,
            cards=tuple(plug_in(link, request, inherited) for link in request.network.links),
            guest=guest,
            secure_boot=hardware.secure_boot,
            usb=open_usb(hardware, inherited),
            pci=tuple(device.address for device in self._pci),
            incoming=bool(request.saved),
            forward_ssh=hardware.seed is not None,
        )
        self._spec, self._drives, self._compat = spec, hardware.drives, hardware.compat
        self._ports = {card.mac: number for number, card in enumerate(machine.cards)}
        self._qemu.memory_bytes = machine.memory_bytes
        self._qemu.links = tuple(link.host_link for link in request.network.links if link.host_link)
        return machine

    def _add_tpm(self, request: BootRequest, log: int, inherited: Inherited) -> int:
        """The number of QEMU's connection to it."""
        assert isinstance(request.rootfs, HardwarePlan)
        number, pid = start_tpm(
            request.rootfs.tpm_state, request.spec.id, log, inherited, enter=self._qemu.bounds.enter
        )  # fmt: skip
        self._qemu.helpers.append(pid)
        return number

    # -- while it runs

    def power_down(self) -> None:
        """See `Powered.power_down`."""
        try:
            self._qemu.monitor.command("system_powerdown")
        except MonitorClosed:
            return  # it is ending already: its pidfd tells

    def quit(self) -> None:
        """See `Powered.quit`. QEMU that gets SIGTERM writes its caches out, and ends."""
        self._qemu.signal(signal.SIGTERM)

    def pause(self) -> None:
        self._qemu.pause()

    def resume(self) -> None:
        self._qemu.monitor.command("cont")

    def save(self, directory: str) -> None:
        """See `Saving.save`."""
        assert self._spec is not None
        if self._pci:
            raise Unsupported(
                "what a PCI device of this host is about cannot be saved",
                hint="save the machine's disks alone: --no-memory",
            )
        hotplug_cpus.check_number(self._qemu.monitor, rules.cpus(self._spec))
        self._qemu.bounds.make_room(directory, self._qemu.memory_bytes)
        saved.write(self._qemu.monitor, self._describe(self._spec), directory)

    def check_saved(self, spec: MachineSpec, directory: str) -> None:
        """See `Saving.check_saved`."""
        cards = 0 if spec.network == "none" else len(spec.attachments) or 1
        self._ports = {str(number): number for number in range(cards)}
        version = saved.ask_version(find_pc_board(spec.platform).program)
        now = self._describe(_as_started(spec, directory))
        saved.check(now._replace(version=version), directory)

    def _describe(self, spec: MachineSpec) -> saved.SavedMachine:
        """What has to be the same where it goes on: its devices stand where they stood."""
        hardware, board = _hardware(spec), find_pc_board(spec.platform)
        drives = self._drives or hardware.drives
        devices = [
            spec.type, hardware.firmware, *(["compat"] if hardware.compat else []),
            *(["tpm"] if hardware.tpm else []), *(["secure-boot"] if hardware.secure_boot else []),
            *(pc_arguments.drive_name(drive, number) for number, drive in enumerate(drives)),
            *(f"card{port}" for port in sorted(self._ports.values())),
            *([f"{most_cpus(board, rules.cpus(spec))} places for CPUs"] if board.hot_cpus else []),
        ]  # fmt: skip
        return saved.SavedMachine(
            saved.FORMAT, "", spec.platform, rules.cpus(spec), self._qemu.memory_bytes or rules.memory_bytes(spec),
            len(self._ports), 0, tuple(devices),
        )  # fmt: skip

    def _set_clock(self) -> None:
        """It stood still while the machine was not there; a system without an agent has to notice by itself."""
        try:
            if self._guest is not None and guest_agent.is_there(self._qemu.monitor):
                self._guest.set_time(time.time_ns())
        except RemoteError:
            return

    def screenshot(self, format: str) -> bytes:
        """See `Screened.screenshot`."""
        return screen.take_picture(self._qemu.monitor, format)

    def press_keys(self, words: tuple[str, ...], text: str) -> None:
        """See `Screened.press_keys`."""
        screen.press(self._qemu.monitor, screen.parse_keys(words, text))

    def change_disc(self, number: int, path: str, format: str) -> None:
        """See `DiscChanging.change_disc`."""
        discs.change(self._qemu.monitor, number, path, format)

    def plug_disk(self, drive: Drive, path: str, *, allowed: tuple[str, ...]) -> None:
        """See `DiskChanging.plug_disk`."""
        if self._compat:
            raise Unsupported(
                "a machine with --compat has IDE disks, which nobody plugs in while it runs",
                hint="stop it first; it starts with the disk then",
            )
        assert self._spec is not None
        queues = find_pc_board(self._spec.platform).disk_queues
        plugging.plug_disk(self._qemu.monitor, drive, path, allowed=allowed, queues=queues)
        self._drives += (drive,)

    def unplug_disk(self, drive: Drive) -> None:
        """See `DiskChanging.unplug_disk`."""
        plugging.unplug_disk(self._qemu.monitor, drive)
        self._drives = tuple(each for each in self._drives if each.slot != drive.slot)

    def resize_disk(self, drive: Drive, number: int, size_bytes: int) -> None:
        """See `DiskChanging.resize_disk`."""
        plugging.resize_disk(self._qemu.monitor, pc_arguments.drive_name(drive, number), size_bytes)

    def plug(self, link: LinkPlan) -> None:
        """See `Pluggable.plug`."""
        self._ports[link.mac] = plugging.plug_card(self._qemu.monitor, link, compat=self._compat)
        self._qemu.links += (link.host_link,) if link.host_link else ()

    def unplug(self, link: LinkPlan) -> None:
        """See `Pluggable.unplug`."""
        self._qemu.links = tuple(name for name in self._qemu.links if name != link.host_link)
        port = self._ports.pop(link.mac, -1)
        if port >= 0:
            plugging.unplug_card(self._qemu.monitor, port)

    def route(self, link: LinkPlan) -> None:
        """See `Pluggable.route`: its system has routes of its own, and asks for them or is told at its next start."""

    def freeze(self) -> bool:
        """See `Quiescing.freeze`."""
        if self._guest is None or not guest_agent.is_there(self._qemu.monitor):
            return False
        self._guest.freeze()
        return True

    def thaw(self) -> None:
        """See `Quiescing.thaw`."""
        assert self._guest is not None
        self._guest.thaw()

    def find_guest_links(self) -> list[dict[str, object]] | None:
        """See `Quiescing.find_guest_links`."""
        if self._guest is None or not guest_agent.is_there(self._qemu.monitor):
            return None
        return [each._asdict() for each in self._guest.find_links()]

    def set_limits(self, limits: Limits) -> tuple[str, ...]:
        """See `Resizable.set_limits`: the memory, as far as a balloon goes, and the number of CPUs."""
        assert self._spec is not None
        before = self._spec.limits
        if limits._replace(memory_bytes=0, cpus_milli=0) != before._replace(memory_bytes=0, cpus_milli=0):
            raise Unsupported(
                "of a whole machine that runs the memory and the CPUs alone can be changed",
                hint="stop it first, or --memory or --cpus alone",
            )
        if limits.memory_bytes != before.memory_bytes:
            self._set_memory(limits)
        if limits.cpus_milli == before.cpus_milli:
            self._spec = self._spec._replace(limits=limits)
            return ()
        try:
            told = self._set_cpus(limits)
        except NagayaError:
            if limits.memory_bytes != before.memory_bytes:
                self._set_memory(before)
            raise
        self._spec = self._spec._replace(limits=limits)
        return told

    def _set_cpus(self, limits: Limits) -> tuple[str, ...]:
        """As many as that, now. A sentence where its system has to be told of them by hand."""
        assert self._spec is not None
        before = self._spec.limits
        spec, board = self._spec._replace(limits=limits), find_pc_board(self._spec.platform)
        if limits.cpus_milli % 1000 or before.cpus_milli % 1000:
            raise Unsupported(
                "parts of CPUs are for the next start: while it runs, whole ones come and go", hint="stop it first"
            )
        most = most_cpus(board, rules.cpus(self._spec)) if board.hot_cpus else 0
        if not most:
            raise Unsupported(
                f"the CPUs of an {board.architecture} machine are those that it was started with",
                hint="stop it first: it starts with the new number",
            )
        wanted = rules.cpus(spec)
        if wanted > most:
            raise Unsupported(
                f"a machine gets no more than {most} CPUs while it runs",
                hint="stop it first: it starts with the new number",
            )
        more = wanted > rules.cpus(self._spec)
        if more:
            self._qemu.bounds.follow_cpus(spec)
        hotplug_cpus.set_cpus(self._qemu.monitor, wanted)
        return hotplug_cpus.take_into_use(self._qemu.monitor, self._guest, wanted) if more else ()

    def _set_memory(self, limits: Limits) -> None:
        wanted, most = limits.memory_bytes or rules.DEFAULT_MEMORY_BYTES, self._qemu.memory_bytes
        if wanted < rules.LEAST_MEMORY_BYTES:
            raise UsageError(f"a machine needs {rules.LEAST_MEMORY_BYTES >> 20} MiB of memory or more")
        if wanted > most:
            raise Unsupported(
                f"the machine was started with {most >> 20} MiB of memory, and cannot get more while it runs",
                hint="stop it first: it starts with the new size",
            )
        if self._pci:
            raise Unsupported(
                "a machine with a PCI device of this host has all its memory pinned, and cannot give any back",
                hint="stop it first: it starts with the new size",
            )
        if self._compat:
            raise Unsupported("a machine with --compat has no balloon to change its memory by", hint="stop it first")
        plugging.set_memory(self._qemu.monitor, wanted)

    def find_forwarded(self) -> int:
        """The port of this host's loopback that leads to the machine's ssh; 0 = none does."""
        from nagaya.engines.qemu.measures import forwarded_port

        return forwarded_port(self._qemu.monitor.command("human-monitor-command", command_line="info usernet"))

    def _admit_viewer(self) -> None:
        """Somebody has connected to the screen's socket."""
        try:
            connection = unix.accept(self._screen)
        except OSError:
            return  # gone again
        try:
            screen.admit(self._qemu.monitor, connection)
        except NagayaError:
            return  # QEMU does not want it, or ends: the viewer sees its connection closed
        finally:
            os.close(connection)

    def stats(self) -> Stats:
        """See `QemuProcess.stats`."""
        return self._qemu.stats()

    def listen(self) -> None:
        """See `QemuProcess.listen`. It closes what it is heard by when its disks are closed, and has ended soon after."""
        self._qemu.listen(CLOSED_TO_ENDED_S)

    def explain_end(self, ended: os.waitid_result | None) -> NagayaError | None:
        """See `Explaining.explain_end`. That a system switched its machine off needs no explanation."""
        return self._qemu.explain_end(ended)

    def kill(self) -> None:
        """SIGKILL to QEMU: pulls the machine's plug."""
        self._qemu.signal(signal.SIGKILL)

    def reclaim(self, machine_id: str, runtime_dir: str) -> None:
        """See `Engine.reclaim`. QEMU dies with its supervisor, and its tap device and its locks with QEMU."""
        reclaim(machine_id, runtime_dir)

    def oom_killed(self) -> bool:
        """See `OomAware.oom_killed`."""
        return self._qemu.bounds.oom_killed()

    def _abandon(self) -> None:
        """A boot that failed: nothing runs on."""
        self._qemu.abandon()
        self._cleanup()

    def _cleanup(self) -> None:
        self._qemu.clean_up()
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        if self._screen >= 0:
            os.close(self._screen)
            self._screen = -1


def _as_started(spec: MachineSpec, directory: str) -> MachineSpec:
    """With the memory that the machine saved in `directory` was started with; "" = it is started anew."""
    if not directory:
        return spec
    most = saved.started_memory(directory, rules.memory_bytes(spec))
    return spec._replace(limits=spec.limits._replace(memory_bytes=most))


def _hardware(spec: MachineSpec) -> Hardware:
    assert spec.hardware is not None  # `engine_of` has looked
    return spec.hardware
