"""The engine of whole machines: QEMU with a firmware, drives and a screen, and nothing of ours inside.

What an agent is to other machines, the serial console, the power button and the monitor are to these.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack

from nagaya.engines.base import FEATURES, Booted, BootRequest, Stats
from nagaya.engines.qemu import discs, pc_arguments, rights, screen
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.pc_arguments import PcMachine
from nagaya.engines.qemu.pc_boards import UEFI, find_firmware, find_loader, find_pc_board
from nagaya.engines.qemu.pc_parts import kvm_groups, open_drives, open_firmware, plug_in, require_program
from nagaya.engines.qemu.process import QemuProcess
from nagaya.engines.vm import child, rules
from nagaya.errors import HostError, NagayaError, Unsupported, UsageError
from nagaya.kernel import unix
from nagaya.model.policy import APPLET
from nagaya.model.spec import Hardware, MachineSpec
from nagaya.storage.plan import HardwarePlan

END_WITHIN_S = 10.0  # from being switched off until its last data must be on its disks
CLOSED_TO_ENDED_S = 2.0
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
        self._qemu = QemuProcess()
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
                log_end = self._qemu.open_log(request.runtime_dir)
                local.callback(os.close, log_end)
                machine = self._assemble(request, inherited, local, console_number)
                launch = child.Launch(
                    argv=pc_arguments.plan_pc(machine),
                    descriptors=tuple(inherited.fds),
                    log=log_end,
                    prepare=rights.plan_rights(
                        machine.id,
                        host_network=any(card.tap < 0 for card in machine.cards),
                        groups=kvm_groups() if machine.kvm else (),
                    ),
                )
                self._qemu.start(launch)
            self._qemu.greet()
            self._screen = unix.listen(request.runtime_dir, SCREEN)
            failed.pop_all()
        stack.callback(self._cleanup)
        return Booted(
            pid=self._qemu.pid,
            pidfd=os.dup(self._qemu.pidfd),
            agent=-1,
            console=console,
            policy=APPLET,
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
        machine = PcMachine(
            board=board,
            id=spec.id,
            kvm=self.type == "kvm",
            cpus=rules.cpus(spec),
            memory_bytes=rules.memory_bytes(spec),
            compat=hardware.compat,
            firmware=open_firmware(board, hardware, plan, inherited),
            drives=open_drives(hardware, plan, inherited, local),
            monitor=self._qemu.open_monitor(inherited),
            console=console,
            cards=tuple(plug_in(link, request, inherited) for link in request.network.links),
            forward_ssh=hardware.seed is not None,
        )
        self._qemu.memory_bytes = machine.memory_bytes
        self._qemu.links = tuple(link.host_link for link in request.network.links if link.host_link)
        return machine

    # -- while it runs

    def power_down(self) -> None:
        """See `Powered.power_down`."""
        self._qemu.monitor.command("system_powerdown")

    def quit(self) -> None:
        """See `Powered.quit`. QEMU that gets SIGTERM writes its caches out, and ends."""
        self._qemu.signal(signal.SIGTERM)

    def pause(self) -> None:
        self._qemu.monitor.command("stop")

    def resume(self) -> None:
        self._qemu.monitor.command("cont")

    def screenshot(self, format: str) -> bytes:
        """See `Screened.screenshot`."""
        return screen.take_picture(self._qemu.monitor, format)

    def press_keys(self, words: tuple[str, ...], text: str) -> None:
        """See `Screened.press_keys`."""
        screen.press(self._qemu.monitor, screen.parse_keys(words, text))

    def change_disc(self, number: int, path: str, format: str) -> None:
        """See `DiscChanging.change_disc`."""
        discs.change(self._qemu.monitor, number, path, format)

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

    def reclaim(self, machine_id: str) -> None:
        """See `Engine.reclaim`. QEMU dies with its supervisor, and its tap device and its locks with QEMU."""

    def _abandon(self) -> None:
        """A boot that failed: nothing runs on."""
        self._qemu.abandon()
        self._cleanup()

    def _cleanup(self) -> None:
        self._qemu.clean_up()
        if self._screen >= 0:
            os.close(self._screen)
            self._screen = -1


def _hardware(spec: MachineSpec) -> Hardware:
    assert spec.hardware is not None  # `engine_of` has looked
    return spec.hardware
