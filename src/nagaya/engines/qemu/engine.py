"""The emulated engine's supervisor side: plan, start QEMU, shake hands over its monitor, and later pause, measure, kill."""

from __future__ import annotations

import os
import signal
import stat
import time
from contextlib import ExitStack

from nagaya.engines.base import Booted, BootRequest, Stats
from nagaya.engines.qemu import arguments, rights, saved
from nagaya.engines.qemu.arguments import Card, Machine, Share
from nagaya.engines.qemu.boards import BOARDS, Board, find_board
from nagaya.engines.qemu.counter import find_khz
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.last_words import launch_error
from nagaya.engines.qemu.measures import block_bytes
from nagaya.engines.qemu.monitor import Monitor, MonitorClosed
from nagaya.engines.vm import child, rules
from nagaya.engines.vm.agent import agent_path
from nagaya.engines.vm.console import TextLog
from nagaya.engines.vm.copies import plan_copies
from nagaya.engines.vm.parts import open_data, open_initramfs
from nagaya.engines.vm.passt import start_passt
from nagaya.engines.vm.setup import plan_setup
from nagaya.engines.vm.shares import TAG as SHARES_TAG
from nagaya.engines.vm.shares import start_shares
from nagaya.errors import HostError, LaunchError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.kernel.process import read_usage
from nagaya.kernels import cache
from nagaya.model.spec import MachineSpec
from nagaya.net import links, tap
from nagaya.net.plan import LinkPlan
from nagaya.net.planning import find_passt
from nagaya.protocol.setup import setup_payload
from nagaya.storage.plan import DiskPlan, RootfsPlan

STARTED_WITHIN_S = 30.0  # QEMU itself, not its guest
PROGRAM_WITHIN_S = 120.0
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
    capabilities = frozenset(("pause", "stats", "explain", "memory", "offline"))
    missing = rules.MISSING

    def __init__(self) -> None:
        self._pid = -1
        self._pidfd = -1
        self._memory_bytes = 0
        self._links: tuple[str, ...] = ()
        self._machine: Machine | None = None
        self._monitor: Monitor | None = None
        self._console: TextLog | None = None
        self._log: TextLog | None = None
        self._helpers: list[int] = []  # children of ours beside QEMU

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
        with ExitStack() as failed:
            failed.callback(self._abandon)
            with ExitStack() as local:
                inherited = Inherited(local)
                agent, agent_number = inherited.connect()
                failed.callback(os.close, agent)
                log_end = self._open_log(request.runtime_dir)
                local.callback(os.close, log_end)
                machine = self._assemble(request, board, log_end, inherited)
                machine = machine._replace(agent=agent_number, incoming=bool(request.saved))
                shares = start_shares(request.mounts, request.runtime_dir, log_end, local)
                if shares is not None:
                    self._helpers.append(shares.pid)
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
            # QEMU's ends are QEMU's alone now: each of us hears when the other ends.
            self._greet()
            if request.saved:
                self._go_on_from(request.saved)
            failed.pop_all()
        stack.callback(self._cleanup)
        return Booted(
            pid=self._pid,
            pidfd=os.dup(self._pidfd),
            agent=agent,
            policy=rules.plan_policy(spec),
            warnings=(
                *rules.check_spec(spec),
                *((USER_NETWORK_WARNING,) if request.network.is_user and not find_passt() else ()),
            ),
            setup=payload,
            helpers=tuple(self._helpers),
            copies=plan_copies(request.mounts) if shares is None else (),
            watch=tuple((source.fd, self.listen) for source in self._sources()),
            start_timeout_s=PROGRAM_WITHIN_S,
            end_timeout_s=END_WITHIN_S,
        )

    def _open_log(self, directory: str) -> int:
        """Where QEMU and its helpers write: never blocks, so what does not fit is lost."""
        log, end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._log = TextLog(log, f"{directory}/qemu.log")
        return end

    def _assemble(self, request: BootRequest, board: Board, log: int, inherited: Inherited) -> Machine:
        """Open what the machine is made of."""
        disks = request.rootfs
        assert isinstance(disks, DiskPlan)  # our `rootfs_kind`
        monitor, monitor_number = inherited.connect()
        self._monitor = Monitor(monitor)
        console, console_number = inherited.connect()
        self._console = TextLog(console, f"{request.runtime_dir}/console.log")
        machine = Machine(
            board=board,
            name=request.spec.id,
            cpus=rules.cpus(request.spec),
            memory_bytes=rules.memory_bytes(request.spec),
            kernel=inherited.add(_open_kernel(request.spec, board)),
            initrd=inherited.add(open_initramfs(board.architecture)),
            root=inherited.add(os.open(disks.image, os.O_RDONLY | os.O_CLOEXEC)),
            data=inherited.add(open_data(disks.data)),
            monitor=monitor_number,
            agent=-1,
            console=console_number,
            cards=tuple(self._plug(link, request, log, inherited) for link in request.network.links),
            append=request.spec.append,
            tsc_khz=find_khz() if board.architecture == "x86_64" else 0,
        )
        self._memory_bytes = machine.memory_bytes
        self._links = tuple(link.host_link for link in request.network.links if link.host_link)
        return machine

    def _plug(self, link: LinkPlan, request: BootRequest, log: int, inherited: Inherited) -> Card:
        """What a network card of the machine's is plugged into. Without passt, QEMU's own user-mode network will do."""
        if link.driver != "user":
            return Card(link.mac, tap=inherited.add(tap.open_link(link)))
        if not find_passt():
            return Card(link.mac, ports=request.network.forwards)
        with ExitStack() as local:
            passt = start_passt(link, request.network, request.spec.id, log, local)
            self._helpers.append(passt.pid)
            return Card(link.mac, stream=inherited.add(os.dup(passt.socket)))

    def _start(self, machine: Machine, inherited: Inherited, log: int) -> None:
        user_network = any(card.is_own for card in machine.cards)
        launch = child.Launch(
            argv=arguments.plan_command(machine),
            descriptors=tuple(inherited.fds),
            log=log,
            prepare=rights.plan_rights(machine.name, host_network=user_network),
        )
        self._pid = child.start(launch)
        self._pidfd = os.pidfd_open(self._pid)

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

    def _go_on_from(self, directory: str) -> None:
        """Load what was saved, and let the CPUs run."""
        assert self._monitor is not None and self._machine is not None
        saved.check(self._machine, saved.read_version(self._monitor), directory)
        state = os.open(f"{directory}/{saved.STATE}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._monitor.command("getfd", fdname="state", descriptor=state)
            saved.await_migration(
                self._monitor, "migrate-incoming", "fd:state", "the saved machine could not be loaded"
            )
            self._monitor.command("cont")
        except MonitorClosed:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
            raise self._launch_error("QEMU could not go on from the saved machine", ended) from None
        finally:
            os.close(state)

    # -- while it runs

    def save(self, directory: str) -> None:
        """See `Saving.save`."""
        assert self._monitor is not None and self._machine is not None
        if self._machine.shares:
            raise Unsupported(
                "QEMU cannot save a machine that shares directories with this host",
                hint="save its disks alone: --no-memory",
            )
        saved.write(self._monitor, self._machine, directory)

    def check_saved(self, spec: MachineSpec, directory: str) -> None:
        """See `Saving.check_saved`."""
        board = find_board(spec.platform)
        machine = Machine(
            board, spec.id, rules.cpus(spec), rules.memory_bytes(spec), -1, -1, -1, -1, -1, -1, -1,
            cards=() if spec.network == "none" else (Card(""),) * (len(spec.attachments) or 1),
            tsc_khz=find_khz() if board.architecture == "x86_64" else 0,
        )  # fmt: skip
        saved.check(machine, saved.ask_version(board.program), directory)

    def pause(self) -> None:
        assert self._monitor is not None
        self._monitor.command("stop")

    def resume(self) -> None:
        assert self._monitor is not None
        self._monitor.command("cont")

    def stats(self) -> Stats:
        """CPU time of QEMU's process and its helpers, memory of the first; counters of the guest's devices."""
        assert self._monitor is not None
        cpu_ns, resident_bytes = read_usage(self._pid)
        cpu_ns += sum(read_usage(pid)[0] for pid in self._helpers)
        reading = Stats(cpu_ns=cpu_ns, memory_bytes=resident_bytes, memory_limit_bytes=self._memory_bytes)
        read, written = block_bytes(self._monitor.command("query-blockstats", query_nodes=False))
        reading = reading._replace(block_read_bytes=read, block_write_bytes=written)
        if self._links:  # the host's ends: what they send is what the machine receives
            sent, received = links.link_bytes(self._links)
            reading = reading._replace(net_rx_bytes=sent, net_tx_bytes=received)
        return reading

    def listen(self) -> None:
        """Take what the guest's console, QEMU and its monitor have said. A QEMU that closes one of them has ended, or
        has been taken over: it is not to live on.
        """
        for source in self._sources():
            if not source.drain():
                self.kill()

    def _sources(self) -> list[TextLog | Monitor]:
        return [source for source in (self._console, self._log, self._monitor) if source is not None]

    def explain_end(self, ended: os.waitid_result | None) -> NagayaError | None:
        """See `Explaining.explain_end`: a kernel that gave up has said so on its console, QEMU on its standard error."""
        if self._console is None or self._log is None:
            return None
        self._console.drain()
        panic = self._console.panic()
        if panic:
            return LaunchError(f"the machine's kernel gave up: {panic}", command="linux", log_tail=self._console.tail())
        if ended is None or (ended.si_code, ended.si_status) in ((os.CLD_EXITED, 0), (os.CLD_KILLED, signal.SIGKILL)):
            return None
        how = "ended with status" if ended.si_code == os.CLD_EXITED else "was killed by signal"
        return self._launch_error(f"QEMU {how} {ended.si_status}", ended)

    def kill(self) -> None:
        """SIGKILL to QEMU. What its guest has written is in the host's page cache by then, and stays."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return

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

    def reclaim(self, machine_id: str) -> None:
        """See `Engine.reclaim`. QEMU dies with its supervisor, and its tap device with QEMU: nothing is left."""

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
        self._console = self._log = self._monitor = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pid = self._pidfd = -1
        for pid in self._helpers:  # each has ended when QEMU had, for nobody speaks with it any more
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._helpers = []


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
