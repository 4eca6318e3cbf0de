"""The emulated engine's supervisor side: plan, start QEMU, shake hands over its monitor, and later pause, measure, kill."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from nagaya.engines.base import Booted, BootRequest, Incoming, Stats
from nagaya.engines.qemu import arguments, rights, saved
from nagaya.engines.qemu.arguments import Card, Machine, Share
from nagaya.engines.qemu.boards import BOARDS, Board, find_board
from nagaya.engines.qemu.counter import find_khz
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.monitor import Monitor
from nagaya.engines.qemu.mover import Mover
from nagaya.engines.qemu.process import QemuProcess
from nagaya.engines.vm import child, rules
from nagaya.engines.vm.agent import agent_path
from nagaya.engines.vm.bounds import reclaim
from nagaya.engines.vm.console import TextLog
from nagaya.engines.vm.copies import plan_copies
from nagaya.engines.vm.parts import open_data, open_initramfs
from nagaya.engines.vm.passt import start_passt
from nagaya.engines.vm.setup import plan_setup
from nagaya.engines.vm.shares import TAG as SHARES_TAG
from nagaya.engines.vm.shares import start_shares
from nagaya.errors import (
    HostError,
    IntegrityError,
    LaunchError,
    NagayaError,
    NotFound,
    RemoteError,
    Unsupported,
    UsageError,
)
from nagaya.kernel import unix
from nagaya.kernels import cache
from nagaya.model.spec import MachineSpec
from nagaya.net import tap
from nagaya.net.plan import LinkPlan
from nagaya.net.planning import find_passt
from nagaya.protocol.setup import setup_payload
from nagaya.storage.plan import DiskPlan, RootfsPlan
from nagaya.storage.records import from_data, to_data

MOVES = "moves.sock"
MIGRATED = "migrated"
PROGRAM_WITHIN_S = 120.0
RECOVERED_WITHIN_S = 10.0
END_WITHIN_S = 20.0
ENTROPY_BYTES = 64
USER_NETWORK_WARNING = (
    "without passt a machine reaches what listens on this host's loopback by 10.0.2.2 (apt-get install passt, or "
    "--network none)"
)


class EmulatedEngine:
    """Boots one machine under QEMU; one instance lives in each supervisor."""

    type = "emulated"
    rootfs_kind = "disk"
    capabilities = frozenset(("pause", "stats", "explain", "oom", "memory", "replug", "fork", "migrate", "offline"))
    missing = rules.MISSING

    def __init__(self) -> None:
        self._qemu = QemuProcess()
        self._mover = Mover()
        self._agent = -1  # of the supervisor's, which has it for as long as the machine runs
        self._place = ""  # the machine's run-time directory
        self._disk_bytes = 0
        self._machine: Machine | None = None

    # -- before a boot

    def check_host(self, *, kernel: str = "") -> None:
        """See `Engine.check_host`."""
        host = os.uname().machine
        board = next((board for board in BOARDS if board.architecture == host), BOARDS[0])
        _require_parts(board, kernel=kernel)

    def find_slowness(self) -> str:
        """See `Engine.find_slowness`: emulation is as slow as it says."""
        return ""

    def check(self, spec: MachineSpec) -> list[str]:
        """Raise for what could not be booted; answers warnings. Changes nothing."""
        board = find_board(spec.platform)
        _require_parts(board, kernel=spec.kernel)
        warnings = rules.check_spec(spec)
        if rules.cpus(spec) > board.most_cpus:
            raise UsageError(f"an emulated machine has at most {board.most_cpus} CPUs")
        _check_links(spec, board)
        return warnings

    # -- boot

    def boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        """Start QEMU. See `Engine.boot`."""
        try:
            return self._boot(request, stack)
        except OSError as error:
            raise HostError.from_os(error, "cannot start the machine") from None

    def _boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        spec = request.spec
        board = find_board(spec.platform)
        bounds, self._place = self._qemu.bounds, request.runtime_dir
        bounds.make(request.spec, request.runtime_dir, stack, translates=True)
        with ExitStack() as failed:
            failed.callback(self._qemu.abandon)
            with ExitStack() as local:
                inherited = Inherited(local)
                agent, agent_number = inherited.connect()
                failed.callback(os.close, agent)
                log_end = self._qemu.open_log(request.runtime_dir)
                local.callback(os.close, log_end)
                machine = self._assemble(request, board, log_end, inherited)
                machine = machine._replace(
                    agent=agent_number, incoming=bool(request.saved) or request.incoming is not None,
                    moves=inherited.add(unix.listen(request.runtime_dir, MOVES)),
                )  # fmt: skip
                shares = start_shares(request.mounts, request.runtime_dir, log_end, local, enter=bounds.enter)
                if shares is not None:
                    self._qemu.helpers.append(shares.pid)
                    machine = machine._replace(shares=(Share(SHARES_TAG, inherited.add(os.dup(shares.socket))),))
                setup = plan_setup(
                    request,
                    time_ns=time.time_ns(),
                    entropy=os.urandom(ENTROPY_BYTES),
                    power_off=board.power_off,
                    virtiofs_tags=shares.tags if shares is not None else (),
                )
                payload = setup_payload(setup)
                self._machine = machine
                self._start(machine, inherited, log_end)
                if request.incoming is not None:
                    failed.callback(self._mover.end)
                    self._receive(request, request.incoming, inherited.fds[machine.data - child.FIRST_FD])
            # QEMU's ends are QEMU's alone now: each of us hears when the other ends.
            self._qemu.greet()
            self._agent = agent
            if request.saved:
                saved.go_on(self._qemu, saved.describe(machine), request.saved)
            failed.pop_all()
        stack.callback(self._qemu.clean_up)
        stack.callback(self._mover.end)
        return Booted(
            pid=self._qemu.pid,
            pidfd=os.dup(self._qemu.pidfd),
            agent=agent,
            policy=rules.plan_policy(spec),
            warnings=(
                *rules.check_spec(spec),
                *bounds.warnings,
                *((USER_NETWORK_WARNING,) if request.network.is_user and not find_passt() else ()),
            ),
            setup=payload,
            helpers=tuple(self._qemu.helpers),
            copies=plan_copies(request.mounts) if shares is None and request.incoming is None else (),
            origin=MIGRATED if request.incoming is not None else "",
            watch=tuple((source.fd, self.listen) for source in self._qemu.sources()),
            start_timeout_s=PROGRAM_WITHIN_S,
            end_timeout_s=END_WITHIN_S,
        )

    def _assemble(self, request: BootRequest, board: Board, log: int, inherited: Inherited) -> Machine:
        """Open what the machine is made of."""
        disks = request.rootfs
        assert isinstance(disks, DiskPlan)  # our `rootfs_kind`
        console, console_number = inherited.connect()
        self._qemu.console = TextLog(console, f"{request.runtime_dir}/console.log")
        machine = Machine(
            board=board,
            name=request.spec.id,
            cpus=rules.cpus(request.spec),
            memory_bytes=rules.memory_bytes(request.spec),
            kernel=inherited.add(_open_kernel(request.spec, board)),
            initrd=inherited.add(open_initramfs(board.architecture)),
            root=inherited.add(os.open(disks.image, os.O_RDONLY | os.O_CLOEXEC)),
            data=inherited.add(open_data(disks, form=request.incoming is None)),
            monitor=self._qemu.open_monitor(inherited),
            agent=-1,
            console=console_number,
            cards=tuple(self._plug(link, request, log, inherited) for link in request.network.links),
            append=request.spec.append,
            tsc_khz=find_khz() if board.architecture == "x86_64" else 0,
        )
        self._disk_bytes = os.fstat(inherited.fds[machine.data - child.FIRST_FD]).st_size
        self._qemu.memory_bytes = machine.memory_bytes
        self._qemu.links = tuple(link.host_link for link in request.network.links if link.host_link)
        return machine

    def _plug(self, link: LinkPlan, request: BootRequest, log: int, inherited: Inherited) -> Card:
        """What a network card of the machine's is plugged into. Without passt, QEMU's own user-mode network will do."""
        if link.driver != "user":
            return Card(link.mac, tap=inherited.add(tap.open_link(link)))
        if not find_passt():
            return Card(link.mac, ports=request.network.forwards)
        with ExitStack() as local:
            passt = start_passt(link, request.network, request.spec.id, log, local, enter=self._qemu.bounds.enter)
            self._qemu.helpers.append(passt.pid)
            return Card(link.mac, stream=inherited.add(os.dup(passt.socket)))

    def _start(self, machine: Machine, inherited: Inherited, log: int) -> None:
        user_network = any(card.is_own for card in machine.cards)
        launch = child.Launch(
            argv=arguments.plan_command(machine),
            descriptors=tuple(inherited.fds),
            log=log,
            enter=self._qemu.bounds.enter,
            prepare=rights.plan_rights(machine.name, host_network=user_network),
        )
        self._qemu.start(launch)

    # -- while it runs

    def save(self, directory: str) -> None:
        """See `Saving.save`."""
        assert self._machine is not None
        if self._machine.shares:
            raise Unsupported(
                "QEMU cannot save a machine that shares directories with this host",
                hint="save its disks alone: --no-memory",
            )
        self._qemu.bounds.make_room(directory, self._machine.memory_bytes)
        saved.write(self._qemu.monitor, saved.describe(self._machine), directory)

    def check_saved(self, spec: MachineSpec, directory: str) -> None:
        """See `Saving.check_saved`."""
        saved.check(self._plan_saved(spec), directory)

    def _plan_saved(self, spec: MachineSpec) -> saved.SavedMachine:
        """What a machine would be here."""
        board = find_board(spec.platform)
        machine = Machine(
            board, spec.id, rules.cpus(spec), rules.memory_bytes(spec), -1, -1, -1, -1, -1, -1, -1,
            cards=() if spec.network == "none" else (Card(""),) * (len(spec.attachments) or 1),
            tsc_khz=find_khz() if board.architecture == "x86_64" else 0,
        )  # fmt: skip
        return saved.describe(machine)._replace(version=saved.ask_version(board.program))

    def describe(self) -> str:
        """See `Migrating.describe`."""
        assert self._machine is not None
        described = saved.describe(self._machine)
        return json.dumps(to_data(described._replace(version=saved.read_version(self._qemu.monitor))))

    def check_described(self, spec: MachineSpec, described: str) -> None:
        """See `Migrating.check_described`."""
        try:
            data = json.loads(described)
        except (ValueError, RecursionError):
            raise IntegrityError("what the machine is said to be made of makes no sense") from None
        then = from_data(saved.SavedMachine, data, what="what the machine is said to be made of")
        saved.compare(then, self._plan_saved(spec), hint="stop the machine, and take its disk along")

    def leave(self, stream: tuple[int, int], report_fd: int, *, max_downtime_ms: int, post_copy: bool) -> None:
        """See `Migrating.leave`."""
        assert self._machine is not None
        from nagaya.engines.qemu.leaving import Ends, Leaving  # lazy: migrations alone
        from nagaya.migration.departure import Terms

        terms = Terms(max_downtime_ms, post_copy)
        monitor = self._connect_mover()
        try:
            ends = Ends(*stream, report_fd, monitor, self._agent)
            self._start_mover(self._machine.name, ends, lambda: Leaving(ends, self._disk_bytes, terms).run())
        finally:
            os.close(monitor)

    def recover(self) -> bool:
        """See `Migrating.recover`."""
        from nagaya.engines.qemu.leaving import recover  # lazy: as above

        self._mover.end()
        try:
            monitor = Monitor(self._connect_mover())
            try:
                monitor.negotiate(RECOVERED_WITHIN_S)
                recover(monitor)
            finally:
                monitor.close()
        except (OSError, RemoteError):
            return False  # QEMU has ended, and is heard of otherwise
        return True

    def _receive(self, request: BootRequest, incoming: Incoming, disk: int) -> None:
        """Have a machine whose QEMU waits for it filled."""
        from nagaya.engines.qemu.arriving import arrive  # lazy: migrations alone

        monitor = self._connect_mover()
        try:
            fds = (*incoming.fds, monitor, disk)
            self._start_mover(request.spec.id, fds, lambda: arrive(incoming, monitor, disk))
        finally:
            os.close(monitor)

    def _start_mover(self, machine_id: str, fds: Iterable[int], work: Callable[[], None]) -> None:
        log = f"{self._place}/migration.log"
        self._mover.start(machine_id, log, fds, work, enter=self._qemu.bounds.enter)

    def _connect_mover(self) -> int:
        """QEMU's monitor for whoever moves the machine."""
        fd = unix.connect(self._place, MOVES)
        os.set_blocking(fd, False)
        return fd

    def pause(self) -> None:
        self._qemu.pause()

    def resume(self) -> None:
        self._qemu.monitor.command("cont")

    def replug(self, link: LinkPlan) -> None:
        """See `Replugging.replug`."""
        from nagaya.engines.vm import replugging  # lazy: rare

        replugging.replug(link)

    def plan_renewal(self, links: tuple[LinkPlan, ...], files: tuple[tuple[str, bytes, bytes], ...]) -> bytes:
        """See `Replugging.plan_renewal`."""
        from nagaya.engines.vm import replugging  # lazy: as above

        return replugging.plan_renewal(links, files)

    def stats(self) -> Stats:
        """See `QemuProcess.stats`."""
        return self._qemu.stats()

    def listen(self) -> None:
        """See `QemuProcess.listen`."""
        self._qemu.listen(0)

    def explain_end(self, ended: os.waitid_result | None) -> NagayaError | None:
        """See `Explaining.explain_end`: a kernel that gave up has said so on its console, QEMU on its standard error."""
        console = self._qemu.console
        if console is None:
            return None
        console.drain()
        panic = console.panic()
        if panic:
            return LaunchError(f"the machine's kernel gave up: {panic}", command="linux", log_tail=console.tail())
        return self._qemu.explain_end(ended)

    def kill(self) -> None:
        """SIGKILL to QEMU. What its guest has written is in the host's page cache by then, and stays."""
        self._qemu.signal(signal.SIGKILL)

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
        """See `Engine.reclaim`. QEMU dies with its supervisor, and its tap device with QEMU."""
        reclaim(machine_id, runtime_dir)

    def oom_killed(self) -> bool:
        """See `OomAware.oom_killed`."""
        return self._qemu.bounds.oom_killed()


def list_platforms() -> list[str]:
    """The platforms that this host has all parts to emulate."""
    found = []
    for board in BOARDS:
        try:
            _require_parts(board)
        except Unsupported:
            continue
        found.append(board.platform)
    return found


def _require_parts(board: Board, *, kernel: str = "") -> None:
    """Raise `Unsupported` for what this host lacks to emulate `board`."""
    if not _in_path(board.program):
        raise Unsupported(
            f"{board.program} is not installed, and it emulates {board.platform}",
            hint=f"as root: apt-get install {board.package}",
            finding="it was looked for in PATH",
        )
    if not kernel:
        try:
            cache.get_kernel(architecture=board.architecture)
        except NotFound as missing:
            raise Unsupported(missing.message, hint=missing.hint) from None
    if not os.access(agent_path(board.architecture), os.R_OK):
        raise Unsupported(
            f"the guest agent for {board.platform} is not built ({agent_path(board.architecture)})",
            hint=f"in a checkout: make agent{'' if board.architecture == os.uname().machine else f'-{board.architecture}'}; "
            "else install the package again",
        )


def _in_path(program: str) -> bool:
    directories = child.ENVIRONMENT["PATH"].split(":")
    return any(os.access(f"{directory}/{program}", os.X_OK) for directory in directories)


def _open_kernel(spec: MachineSpec, board: Board) -> int:
    path = spec.kernel or cache.get_kernel(architecture=board.architecture).path
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if os.geteuid() or os.fstat(fd).st_mode & stat.S_IROTH:
        return fd
    # QEMU opens it anew as another user, who may not read this one: as distributions keep theirs in /boot.
    try:
        copy = os.memfd_create("kernel", os.MFD_CLOEXEC)
        while os.sendfile(copy, fd, None, 1 << 24):
            pass
    finally:
        os.close(fd)
    return copy


def _check_links(spec: MachineSpec, board: Board) -> None:
    """The board's transports are few: the machine's own devices come first."""
    room = board.transports - arguments.OWN_DEVICES - any(mount.kind != "tmpfs" for mount in spec.mounts)
    if len(spec.attachments) > room:
        raise Unsupported(
            f"an emulated machine of this kind has room for {room} networks, and {len(spec.attachments)} were asked for",
            hint="use --type kvm or --type container, or fewer networks",
        )
