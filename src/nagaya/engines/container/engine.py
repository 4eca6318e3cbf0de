"""The container engine's supervisor side: plan, fork, shake hands, and later pause, measure, limit, kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

from nagaya.engines import mount_rules
from nagaya.engines.base import Booted, BootRequest, Stats
from nagaya.engines.cgroups.group import Cgroup, Hierarchy, create_cgroup, find_cgroup, host_hierarchy
from nagaya.engines.container import boot, mounts, policy, seccomp_profile
from nagaya.engines.container.devices import device_rules, look_at, plan_nodes
from nagaya.errors import HostError, Unsupported, UsageError, from_wire
from nagaya.kernel import namespaces, process, unix
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Limits, MachineSpec
from nagaya.net import links
from nagaya.net.plan import LinkPlan
from nagaya.static import Any, NamedTuple
from nagaya.storage.plan import DiskPlan, RootfsPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.container import checkpoint

CACHE = "/var/cache/nagaya"
SYSCTL_PREFIXES = ("kernel.shm", "kernel.msg", "fs.mqueue.")
SYSCTLS = ("kernel.sem", "kernel.domainname", "kernel.hostname")


OLDEST_KERNEL = (5, 12)
HOSTNAME_MAX = 64  # sethostname(2)


def _version(release: str) -> tuple[int, int]:
    """The kernel's version out of uname(2): "6.1.0-18-amd64" is (6, 1)."""
    major, minor = release.split(".")[:2]
    return int(major), int("".join(letter for letter in minor if letter.isdigit()) or 0)


def agent_path() -> str:
    """The agent's program: NAGAYA_AGENT, or the one that the package was built with."""
    override = os.environ.get("NAGAYA_AGENT")
    if override:
        return override
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return f"{package}/_guest/nagaya-agent"


NO_CRIU = "its programs are this host's kernel's, and CRIU, which takes them out of it, is not installed"
# See `engines.base.FEATURES`.
MISSING = {
    "migrate": "its programs are this host's kernel's, and cannot be taken out of it",
    "fork": "its programs are this host's kernel's, and cannot be there twice",
    "storage": "a container's files lie on this host's file system",
    "own-kernel": "a container's programs run on this host's kernel",
    "other-cpus": "a container's programs run on this host's CPU",
}


class ContainerEngine:
    """Boots one container; one instance lives in each supervisor."""

    type = "container"
    rootfs_kind = "directories"
    capabilities = frozenset(("pause", "stats", "limits", "oom", "offline", "init", "plug", "memory"))

    def __init__(self) -> None:
        self._runtime_dir = ""
        self._spec: MachineSpec | None = None
        self._sources: tuple[tuple[str, str], ...] = ()  # of what the host has mounted in it: (target, path)
        self._cgroup: Cgroup | None = None
        self._pidfd = -1
        self._links: tuple[str, ...] = ()
        self._inside = -1  # what `_pidfd` means, as a number
        self._stub = -1  # pidfd of the PID namespace's first process, where that is not the agent

    @property
    def missing(self) -> dict[str, str]:
        """See `Engine`."""
        why = self.why_not_save()
        return MISSING | {"memory": why} if why else MISSING

    def why_not_save(self) -> str:
        """See `Saving.why_not_save`."""
        from nagaya.engines.container.criu import find_criu  # lazy: snapshots alone

        return "" if find_criu() else NO_CRIU

    # -- before a boot

    def check_host(self, *, kernel: str = "") -> None:
        """See `Engine.check_host`."""
        if os.geteuid() != 0:
            raise Unsupported(
                "containers need root on this host so far",
                hint="run the command as root, for example with sudo",
                finding=f"effective user id {os.geteuid()}",
            )
        release = os.uname().release
        if _version(release) < OLDEST_KERNEL:
            raise Unsupported(
                f"containers need Linux {'.'.join(map(str, OLDEST_KERNEL))} or newer, and this is {release}",
                finding="mount_setattr(2) came with that version",
            )
        if not os.access(agent_path(), os.X_OK):
            raise Unsupported(
                f"the guest agent is not built ({agent_path()})", hint="run 'make agent', or install the package again"
            )

    def find_slowness(self) -> str:
        """See `Engine.find_slowness`."""
        return ""

    def check(self, spec: MachineSpec) -> list[str]:
        """Raise for what could not be booted; answers warnings. Changes nothing."""
        if len(os.fsencode(spec.hostname)) > HOSTNAME_MAX:
            raise UsageError(f"the host name '{spec.hostname}' is longer than {HOSTNAME_MAX} bytes")
        if spec.kernel or spec.append:
            raise Unsupported(
                f"a container runs on this host's kernel: {'--kernel' if spec.kernel else '--append'} is for machines"
                " that have their own",
                hint="use --type kvm or --type emulated",
            )
        if spec.network == "user":
            raise Unsupported(
                "a user-mode network is for virtual machines: a container is root's, who has bridges",
                hint="leave --network user away, or use --type kvm or --type emulated",
            )
        mask = policy.capability_mask(spec.security)
        if spec.security.seccomp not in ("default", "unconfined"):
            seccomp_profile.load_profile(spec.security.seccomp, mask)
        warnings = list(policy.settle_rlimits(policy.rlimits(spec.ulimits))[1]) if spec.ulimits else []
        if spec.limits.storage_bytes:
            warnings.append("--storage is not applied to containers: they write to this host's own file system")
        for name in policy.missing_capabilities(spec.security):
            warnings.append(f"this host's root does not have CAP_{name} itself: the machine goes without")
        for device in spec.devices:
            look_at(device)
        for mount in spec.mounts:
            mount_rules.check_target(mount.target)
            mount_rules.check_options(mount.options)
        for key, _ in spec.sysctls:
            _check_sysctl(key, host_network=spec.network == "host")
        return warnings

    # -- boot

    def boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        """Start the container and its agent. See `Engine.boot`."""
        try:
            return self._boot(request, stack)
        except OSError as error:
            raise HostError.from_os(error, "cannot start the machine") from None

    def _boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        spec, layout = request.spec, request.rootfs
        assert isinstance(layout, RootfsPlan)  # our `rootfs_kind`
        self._runtime_dir, self._spec = request.runtime_dir, spec
        mask = policy.capability_mask(spec.security)
        limits, warnings = policy.settle_rlimits(policy.rlimits(spec.ulimits)) if spec.ulimits else ((), ())
        filter_ = seccomp_profile.compile_profile(spec.security.seccomp, mask, CACHE)
        confined = spec.security.no_new_privileges
        userns = spec.userns == "auto"
        hierarchy = host_hierarchy()  # once: a host may have thousands of mounts
        steps = _plan_mounts(request, hierarchy, userns=userns)
        # A user namespace may not make device nodes: the host's are bound instead.
        nodes = () if userns else plan_nodes(spec.devices)
        self._links = tuple(link.host_link for link in request.network.links)
        self._sources = tuple((step.target, step.source) for step in steps if not step.fstype)
        cgroup = self._make_cgroup(spec, hierarchy, stack)
        programs = ProcessPolicy(mask, confined, filter_ if confined else b"", limits)
        if request.saved:
            booted = self._go_on(request, layout, cgroup, programs)
            return booted._replace(warnings=(*warnings, *cgroup.warnings, *booted.warnings))
        with ExitStack() as local:  # descriptors that only the boot itself needs
            userns_fd, uid_base = _open_userns(spec.id, local) if userns else (-1, 0)
            program = process.sealed_copy(agent_path())
            local.callback(os.close, program)
            handshake, child_handshake = unix.socket_pair()
            local.callback(os.close, handshake)
            plan = boot.Plan(
                request=request,
                layout=layout,
                cgroup=cgroup,
                steps=steps,
                device_nodes=nodes,
                agent_capabilities=policy.agent_mask(mask),
                no_new_privileges=confined,
                agent_seccomp=b"" if confined else filter_,
                handshake=child_handshake,
                program=program,
                userns=userns_fd,
                uid_base=uid_base,
                rlimits=limits,
            )
            started = _start(plan, handshake)
        self._pidfd, self._stub, self._inside = os.dup(started.pidfd), started.stub, started.pid
        told = (*warnings, *cgroup.warnings, *started.warnings)
        return Booted(started.pid, started.pidfd, started.agent, programs, told)

    def _go_on(self, request: BootRequest, layout: RootfsPlan, cgroup: Cgroup, programs: ProcessPolicy) -> Booted:
        """The programs come out of files, and not to be by a boot."""
        from nagaya.engines.container import checkpoint  # lazy: few containers are restored with their memory

        record = checkpoint.load(request.spec, request.saved)
        gone = set(record.mounts) - {target for target, _ in self._sources}
        if gone:
            raise Unsupported(
                f"the container was saved with {min(gone)} mounted from this host, and it is not any more"
            )
        with ExitStack() as local:
            handshake, child_handshake = unix.socket_pair()
            local.callback(os.close, handshake)
            plan = checkpoint.Plan(request, layout, cgroup, self._sources, record, child_handshake, request.runtime_dir)
            started = _start_restored(plan, handshake)
        self._pidfd, self._inside = os.dup(started.pidfd), started.pid
        return Booted(started.pid, started.pidfd, started.agent, programs, started.warnings, origin="saved")

    def _make_cgroup(self, spec: MachineSpec, hierarchy: Hierarchy, stack: ExitStack) -> Cgroup:
        try:
            self._cgroup = create_cgroup(spec.id, spec.limits, devices=device_rules(spec.devices), hierarchy=hierarchy)
        except OSError as error:
            raise HostError.from_os(error, "cannot make the machine's control group") from None
        stack.callback(self._cleanup)
        return self._cgroup

    # -- while it runs

    def pause(self) -> None:
        assert self._cgroup is not None
        self._cgroup.freeze()

    def resume(self) -> None:
        assert self._cgroup is not None
        self._cgroup.thaw()

    def save(self, directory: str) -> None:
        """See `Saving.save`."""
        from nagaya.engines.container import checkpoint  # lazy: as above

        assert self._cgroup is not None and self._spec is not None
        targets = tuple(target for target, _ in self._sources)
        try:
            checkpoint.save(self._spec, self._inside, self._cgroup, targets, directory, self._runtime_dir)
        except OSError as error:
            raise HostError.from_os(error, "cannot save the machine's memory") from None

    def check_saved(self, spec: MachineSpec, directory: str) -> None:
        """See `Saving.check_saved`."""
        from nagaya.engines.container import checkpoint  # lazy: as above

        checkpoint.check(spec, directory)

    def stats(self) -> Stats:
        assert self._cgroup is not None
        reading = self._cgroup.stats()
        if self._links:  # the host's ends of the pairs: what they send is what the machine receives
            sent, received = links.link_bytes(self._links)
            reading = reading._replace(net_rx_bytes=sent, net_tx_bytes=received)
        return reading

    def plug(self, link: LinkPlan) -> None:
        """See `Pluggable.plug`."""
        from nagaya.engines.container.plugging import plug  # lazy: few machines are plugged in while they run

        plug(link, self._inside, self._pidfd)
        self._links = (*self._links, link.host_link)

    def unplug(self, link: LinkPlan) -> None:
        """See `Pluggable.unplug`: of a pair both ends have gone, and of what hangs on a link of the host's none."""
        self._links = tuple(name for name in self._links if name != link.host_link)
        if link.driver == "macvlan":
            from nagaya.engines.container.plugging import unplug  # lazy: as above

            unplug(link, self._pidfd)

    def route(self, link: LinkPlan) -> None:
        """See `Pluggable.route`."""
        from nagaya.engines.container.plugging import route  # lazy: as above

        route(link, self._pidfd)

    def set_limits(self, limits: Limits) -> tuple[str, ...]:
        """See `Resizable.set_limits`."""
        assert self._cgroup is not None
        self._cgroup.set_limits(limits)
        return ()

    def oom_killed(self) -> bool:
        return self._cgroup is not None and self._cgroup.oom_kills() > 0

    def kill(self) -> None:
        """SIGKILL to the container's init: the kernel ends all others of the PID namespace with it.

        With `--init=false` the agent is not that init: the control group's processes are killed one by one then.
        """
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self._stub >= 0 and self._cgroup is not None:
            self._cgroup.kill()

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
        from nagaya.engines.container.offline import start_applet  # lazy: only `cp` of a stopped machine

        assert isinstance(rootfs, RootfsPlan) and not data_disk  # our `rootfs_kind`
        return start_applet(rootfs, argv, stdin, stdout, stderr)

    def _cleanup(self) -> None:
        """After the end: nothing of the container stays on the host."""
        cgroup, self._cgroup = self._cgroup, None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if cgroup is not None:
            cgroup.remove()
        if (
            self._stub >= 0
        ):  # the program was the agent's child: with the agent gone and unless it reaped it, it is ours
            try:
                os.waitid(os.P_PIDFD, self._stub, os.WEXITED)
            except ChildProcessError:
                pass
            os.close(self._stub)
            self._stub = -1

    def reclaim(self, machine_id: str, runtime_dir: str) -> None:
        """Kill and remove what a killed supervisor left. See `Engine.reclaim`."""
        cgroup = find_cgroup(machine_id)
        if cgroup is not None:
            cgroup.kill()
            cgroup.remove()


def _open_userns(machine_id: str, stack: ExitStack) -> tuple[int, int]:
    from nagaya.engines.container.userns import open_userns  # lazy: few machines ask for one

    userns, base = open_userns(machine_id)
    stack.callback(os.close, userns)
    return userns, base


def _plan_mounts(request: BootRequest, hierarchy: Hierarchy, *, userns: bool) -> tuple[mounts.MountStep, ...]:
    steps = mounts.plan_mounts(
        request.mounts,
        cgroups=_cgroup_mounts(hierarchy),
        host_network=request.network.kind == "host",
        userns=userns,
        etc=request.etc,
    )
    if userns and request.spec.devices:
        devices = request.spec.devices
        steps += tuple(mounts.MountStep("", device.host_path, device.path, is_file=True) for device in devices)
    if any(mount.propagation.removeprefix("r") != "private" for mount in request.mounts):
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mounts.require_propagation(steps, file.read())
    return steps


def _cgroup_mounts(hierarchy: Hierarchy) -> mounts.CgroupMounts:
    if hierarchy.pure_v2:
        return mounts.CgroupMounts(v2=True)
    by_mount: dict[str, list[str]] = {}
    for controller, where in hierarchy.v1.items():
        by_mount.setdefault(where, []).append(controller)
    return mounts.CgroupMounts(
        v2=False, v1=tuple((os.path.basename(where), ",".join(names)) for where, names in by_mount.items())
    )


def _check_sysctl(key: str, *, host_network: bool) -> None:
    """Only what a namespace keeps for itself: anything else would change the host."""
    parts = boot.sysctl_path(key).split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in key:
        raise UsageError(f"'{key}' is not the name of a sysctl", hint="for example net.ipv4.ip_forward")
    if key.startswith("net.") and not host_network:
        return
    if key.startswith(SYSCTL_PREFIXES) or key in SYSCTLS:
        return
    hint = "allowed are kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.* and, without --network host, net.*"
    raise UsageError(f"sysctl '{key}' belongs to the whole host and cannot be set for one machine", hint=hint)


class _Started(NamedTuple):
    """The machine's init, or with `--init=false` the agent beside it and its stub."""

    pid: int
    pidfd: int
    stub: int  # pidfd, or -1
    agent: int
    warnings: tuple[str, ...]


def _start(plan: boot.Plan, handshake: int) -> _Started:
    """Fork, and shake hands until the agent runs. Raises; nothing runs then."""
    before = _children() if plan.two_processes else frozenset()
    try:
        child = _fork(plan)
    finally:
        os.close(plan.handshake)  # so that the child's end, when it closes, is the last one
    with ExitStack() as failed:
        failed.callback(_abandon, child, before if plan.two_processes else None)
        came: list[int] = []
        failed.callback(_close_all, came)
        messages = _messages(handshake, came)
        inner, warnings = _await_namespaces(messages)
        links.connect(plan.request.network, inner or child)
        pid = inner if inner and plan.request.spec.init else child
        pidfd, stub = os.pidfd_open(pid), -1
        failed.callback(os.close, pidfd)
        if inner and pid == child:
            stub = os.pidfd_open(inner)
            failed.callback(os.close, stub)
        try:
            os.write(handshake, b"g")
        except BrokenPipeError:
            pass  # it has ended, and what it said before that says why
        warnings += _await_agent(messages)
        failed.pop_all()
    if pid != child:
        os.waitpid(child, 0)
    return _Started(pid, pidfd, stub, came[0], tuple(warnings))


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _start_restored(plan: checkpoint.Plan, handshake: int) -> _Started:
    """`_start`, but that CRIU brings the machine's processes back."""
    from nagaya.engines.container import checkpoint  # lazy: few containers are restored with their memory

    try:
        child = os.fork()
        if child == 0:
            checkpoint.run(plan)
    finally:
        os.close(plan.handshake)
    with ExitStack() as failed:
        waiting = failed.enter_context(ExitStack())
        waiting.callback(_abandon, child, None)
        came: list[int] = []
        failed.callback(_close_all, came)
        messages = _messages(handshake, came)
        _, warnings = _await_namespaces(messages)
        links.connect(plan.request.network, child)
        try:
            os.write(handshake, b"g")
        except BrokenPipeError:
            pass  # as in `_start`
        warnings += _await_agent(messages)
        waiting.pop_all()  # it is waited for in any case from here on
        pid = checkpoint.await_restored(child, plan.workspace)
        pidfd = os.pidfd_open(pid)
        failed.pop_all()
    return _Started(pid, pidfd, -1, came[0], tuple(warnings))


def _fork(plan: boot.Plan) -> int:
    """Fork the machine's first process; in it, never returns."""
    if plan.two_processes:
        # The outer child ends early: its own child, the machine's init, becomes ours to wait for.
        process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
        child = os.fork()
        if child == 0:
            boot.run(plan)
        return child
    ours = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        namespaces.unshare(namespaces.CLONE_NEWPID)  # for children only: the next one is its PID 1
        try:
            child = os.fork()
            if child == 0:
                boot.run(plan)
        finally:
            namespaces.setns(ours, namespaces.CLONE_NEWPID)
    finally:
        os.close(ours)
    return child


def _await_namespaces(messages: Iterator[dict[str, Any]]) -> tuple[int, list[str]]:
    """Until the namespaces are there, so that the network can be connected: (inner process or 0, warnings)."""
    warnings: list[str] = []
    for message in messages:
        if "pid" in message:
            return int(message["pid"]), warnings
        warnings.append(_warning(message))
    raise _ended_early()


def _await_agent(messages: Iterator[dict[str, Any]]) -> list[str]:
    """Until the agent's program has taken over, which closes the handshake; its warnings."""
    warnings: list[str] = []
    ready = False
    for message in messages:
        if "ready" in message:
            ready = True
        else:
            warnings.append(_warning(message))
    if not ready:
        raise _ended_early()
    return warnings


def _ended_early() -> HostError:
    return HostError("the machine's first process ended before its agent ran", operation="boot")


def _messages(handshake: int, came: list[int]) -> Iterator[dict[str, Any]]:
    """The child's JSON lines, until it closes its end: by executing the agent, or by ending. With "ready" its end of the agent `came`."""
    rest = b""
    while chunk := _read(handshake, came):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _read(handshake: int, came: list[int]) -> bytes:
    try:
        data, fds = unix.receive_with_fds(handshake, 4096)
    except ConnectionResetError:  # it ended before it read our "g"
        return b""
    came += fds
    return data


def _warning(message: dict[str, Any]) -> str:
    """The message's warning; raises what it says if it is a failure."""
    if "warning" in message:
        return str(message["warning"])
    if "problem" in message:
        raise from_wire(message["problem"])
    number, path = int(message["errno"]), str(message["path"])
    raise HostError.from_os(OSError(number, str(message["text"]), path or None), str(message["step"]))


def _children() -> frozenset[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return frozenset(int(pid) for pid in file.read().split())


def _abandon(child: int, before: frozenset[int] | None) -> None:
    """A boot that failed: end and reap what was forked. Children that nobody has reaped still have their pids.

    The child's own child, whether it told us of it or not, becomes ours as the child ends: what was not there `before`.
    """
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for orphan in _children() - before if before is not None else ():
        os.kill(orphan, signal.SIGKILL)
        os.waitpid(orphan, 0)
