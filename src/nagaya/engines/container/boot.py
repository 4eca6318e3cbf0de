"""The child's side of a boot: from a fork of the supervisor to the agent inside its walls.

It enters the control group, takes copies of what is to be mounted while it still sees the host, makes the namespaces,
mounts, pivots, drops privileges and executes the agent.

The child is born as PID 1 of the machine's PID namespace, for the cheapest fork is the one that is not made. Two cases
take another, the *inner* one, to be PID 1: in a user namespace the PID namespace has to be made from within, or no
/proc could be mounted for it; and with `--init=false` the *outer* one becomes the agent, outside of the PID namespace,
and the inner one the stub that the program replaces.

Every failure goes to the supervisor as one JSON line. Until the agent runs, the supervisor's end of the handshake
closing (it was killed) ends both.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal

from nagaya.engines.base import BootRequest
from nagaya.engines.cgroups.group import Cgroup
from nagaya.engines.container import mounts, policy, rootfs
from nagaya.engines.container.devices import LINKS, DeviceNode
from nagaya.errors import NagayaError, to_wire
from nagaya.kernel import capabilities, namespaces, process, seccomp, unix
from nagaya.kernel import mount as kernel
from nagaya.net import links
from nagaya.static import NamedTuple
from nagaya.storage.plan import RootfsPlan

AGENT_FD = 3
PROGRAM_FD = 4
_AGENT = ".nagaya-agent"
HOST_PLACE = "/dev"


class Plan(NamedTuple):
    """Everything that the child needs, worked out before the fork."""

    request: BootRequest
    layout: RootfsPlan  # the request's
    cgroup: Cgroup
    steps: tuple[mounts.MountStep, ...]
    device_nodes: tuple[DeviceNode, ...]
    agent_capabilities: int
    no_new_privileges: bool
    agent_seccomp: bytes  # a filter that the agent itself gets, when its programs may gain privileges
    handshake: int
    program: int  # memory file of the agent
    userns: int = -1
    uid_base: int = 0
    rlimits: tuple[tuple[int, int, int], ...] = ()

    @property
    def two_processes(self) -> bool:
        """Whether the forked child is not PID 1 itself but its parent."""
        return self.userns >= 0 or not self.request.spec.init


class Failure(Exception):
    """An `OSError` with the step that it happened in."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(step)
        self.step = step
        self.error = error


def run(plan: Plan) -> None:
    """Runs in the forked child and never returns."""
    gc.disable()  # a collection would write to, and so copy, every page that we share with the supervisor
    try:
        _prepare(plan)
    except BaseException as error:
        tell_failure(plan.handshake, error)
    finally:
        os._exit(1)


def tell_failure(handshake: int, error: BaseException) -> None:
    if isinstance(error, NagayaError):
        tell(handshake, problem=to_wire(error))
        return
    step = error.step if isinstance(error, Failure) else "cannot start the machine"
    cause = error.error if isinstance(error, Failure) else error
    if isinstance(cause, OSError):
        path = cause.filename if isinstance(cause.filename, str) else ""
        tell(handshake, step=step, errno=cause.errno or 0, path=path, text=str(cause.strerror))
    else:
        tell(handshake, step="internal error", errno=0, path="", text=repr(cause))


class step:
    """Names the step for the error that may come out of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise Failure(self._name, error)


def tell(handshake: int, **message: object) -> None:
    try:
        os.write(handshake, json.dumps(message).encode() + b"\n")
    except OSError:
        os._exit(1)  # the supervisor is gone


def wait_for_go(handshake: int) -> None:
    if os.read(handshake, 1) != b"g":
        os._exit(1)  # the supervisor was killed, or gave up


def _prepare(plan: Plan) -> None:
    """Everything that needs the host's view."""
    process.close_all_but((plan.handshake, plan.program, plan.userns))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with step("cannot enter the control group"):
        plan.cgroup.enter()
    process.new_session_keyring()
    if plan.rlimits:
        with step("cannot raise a resource limit"):
            policy.make_room(plan.rlimits)
    with step("cannot make a mount namespace"):
        namespaces.unshare(namespaces.CLONE_NEWNS)
    with step("cannot open a mount's source"):
        steps = mounts.open_trees(plan.steps, plan.userns, warn=lambda text: tell(plan.handshake, warning=text))
    with step("cannot part the mounts from the host's"):
        kernel.mount("", "/", "", kernel.MS_SLAVE | kernel.MS_REC)
    root = _mount_root(plan)
    with step("cannot make the machine's namespaces"):
        _enter_namespaces(plan)
        if plan.userns >= 0:
            root = _into_userns(root)
    if plan.two_processes:
        _part(plan, steps, root)
    tell(plan.handshake, pid=0)
    program = _furnish(plan, steps, root)
    _bind_ourselves(plan)
    _become_agent(plan, ["--serve", f"--fd={AGENT_FD}"], program)


def _part(plan: Plan, steps: tuple[mounts.MountStep, ...], root: int) -> None:
    """Fork PID 1. Never returns: the outer process ends, or becomes the agent beside it."""
    spec = plan.request.spec
    pair = unix.socket_pair() if not spec.init else (-1, -1)
    told, telling = os.pipe2(os.O_CLOEXEC)
    mounted, mounting = os.pipe2(os.O_CLOEXEC)
    inner = os.fork()
    if inner == 0:
        for fd in (telling, mounted, pair[0]):
            if fd >= 0:
                os.close(fd)
        _inner(plan, steps, root, stub=pair[1], told=told, mounting=mounting)
    tell(plan.handshake, pid=inner)
    os.write(telling, b"t")
    if spec.init:
        os._exit(0)
    for fd in (told, telling, mounting, pair[1]):
        os.close(fd)
    if os.read(mounted, 1) != b"m":
        os._exit(1)  # the inner process has told why
    _bind_ourselves(plan)
    arguments = ["--serve", f"--fd={AGENT_FD}", f"--program-fd={PROGRAM_FD}", f"--program-pid={inner}"]
    _become_agent(plan, arguments, plan.program, program_fd=pair[0])


def _mount_root(plan: Plan) -> int:
    """The root's mount in our mount namespace, or, for a user namespace, a detached one; its directory descriptor."""
    layout = plan.layout
    target = f"{os.path.dirname(layout.upper)}/rootfs"
    with step("cannot make the root file system's directories"):
        rootfs.prepare(layout)
        if not os.path.isdir(target):
            os.mkdir(target, 0o755)
    with step("cannot mount the root file system"):
        reason = "as at its first start"
        if not rootfs.has_copy(layout):
            try:
                return _idmapped_root(plan) if plan.userns >= 0 else rootfs.mount_overlay(layout, target)
            except OSError as error:
                if not rootfs.cannot_overlay(error):
                    raise
                reason = str(error.strerror)
        tell(plan.handshake, warning=f"overlay cannot be mounted here ({reason}): the machine runs on a copy")
        root = rootfs.mount_copy(layout, target, shift=plan.uid_base)
        if plan.userns < 0:
            return root
        os.close(root)
        return kernel.open_tree(target, kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC)


def _idmapped_root(plan: Plan) -> int:
    """An overlay whose layers show the host's owners shifted into the user namespace (Linux 5.19)."""
    layout = plan.layout

    def mapped(path: str) -> str:
        tree = kernel.open_tree(path, kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC)
        kernel.mount_setattr(tree, set_=kernel.MOUNT_ATTR_IDMAP, userns_fd=plan.userns)
        return f"/proc/self/fd/{tree}"

    writable = mapped(os.path.dirname(layout.upper))  # upper and work must be on one mount
    upper, work = (f"{writable}/{os.path.basename(path)}" for path in (layout.upper, layout.work))
    lower = tuple(mapped(layer) for layer in layout.lower)
    # An overlay works in its upper layer as who mounted it. Root itself has no place in that mapping: the overlay
    # could not make its work directory, and would silently become read-only.
    process.set_file_system_ids(plan.uid_base, plan.uid_base)
    capabilities.raise_effective()  # leaving uid 0 has lowered those about files (capabilities(7))
    try:
        return rootfs.build_overlay(lower, upper, work)
    finally:
        process.set_file_system_ids(0, 0)


def _enter_namespaces(plan: Plan) -> None:
    flags = namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWCGROUP
    if plan.two_processes:
        flags |= namespaces.CLONE_NEWPID
    if plan.request.network.kind != "host":
        flags |= namespaces.CLONE_NEWNET
    if plan.userns >= 0:
        namespaces.setns(plan.userns, namespaces.CLONE_NEWUSER)
        flags |= namespaces.CLONE_NEWNS
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    namespaces.unshare(flags)


def _into_userns(root: int) -> int:
    """Attach the detached root in the user namespace's own mount namespace.

    On /dev, which every host has and everybody may search: the machine's own directory is closed to us by now, and a
    mount that had been attached before the namespace was made would be locked in place, no root to pivot to.
    """
    there = os.open(HOST_PLACE, os.O_PATH | os.O_CLOEXEC)
    kernel.move_mount(root, there)
    os.close(there)
    os.close(root)
    return os.open(HOST_PLACE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _inner(plan: Plan, steps: tuple[mounts.MountStep, ...], root: int, *, stub: int, told: int, mounting: int) -> None:
    """PID 1 of the new namespace, forked by the outer process. Never returns."""
    try:
        # Not before the supervisor can know of us: a process that it does not know would hold the handshake open.
        if os.read(told, 1) != b"t":
            os._exit(1)
        program = _furnish(plan, steps, root)
        _bind_ourselves(plan)
        if stub >= 0:
            os.write(mounting, b"m")  # the outer process, in the same mount namespace, is in the machine's root now too
            _become_agent(plan, ["--stub", f"--fd={AGENT_FD}"], program, channel=stub)
        _become_agent(plan, ["--serve", f"--fd={AGENT_FD}"], program)
    except BaseException as error:
        tell_failure(plan.handshake, error)
    finally:
        os._exit(1)


def _furnish(plan: Plan, steps: tuple[mounts.MountStep, ...], root: int) -> int:
    """The mounts, the pivot, and then what needs the machine's view. Answers the program of PID 1."""
    spec = plan.request.spec
    os.umask(0)
    with step("cannot mount"):
        mounts.apply(tuple(step for step in steps if step.system), root)
    with step("cannot make a device"):
        program = _make_devices(plan, root)
    with step("cannot mount"):
        mounts.apply(tuple(step for step in steps if not step.system), root)
    with step("cannot change the root"):
        if spec.read_only:
            tree = kernel.open_in_root(root, ".", os.O_PATH)
            kernel.mount_setattr(tree, set_=kernel.MOUNT_ATTR_RDONLY)
            os.close(tree)
        os.fchdir(root)
        os.close(root)
        kernel.pivot_root(".", ".")  # pivot_root(2), "pivot_root(".", ".")": the old root lies under the new one now
        kernel.umount(".", kernel.MNT_DETACH)
        os.chdir("/")
    with step("cannot set the host name"):
        namespaces.sethostname(spec.hostname)
    for key, value in spec.sysctls:
        with step(f"cannot set sysctl {key}={value}"):
            _write_sysctl(key, value)
    if not spec.security.unmask:
        with step("cannot hide a kernel path"):
            mounts.mask_paths()
    os.umask(0o022)
    return program


def _make_devices(plan: Plan, root: int) -> int:
    """/dev is a fresh tmpfs of ours, and nothing of the user's is mounted yet: no link is in the way.

    Answers the agent, as a file there without a name: CRIU, which may save PID 1, cannot bring back a program that is a
    memory file's. It is the machine's own, and whoever gets hold of /proc/1/exe can change nothing else by it.
    """
    dev = kernel.open_in_root(root, "dev", os.O_RDONLY | os.O_DIRECTORY, follow=False)
    try:
        for node in plan.device_nodes:
            parent, _, base = node.name.rpartition("/")
            place = mounts.open_target(dev, parent, is_file=False, follow=False) if parent else dev
            os.mknod(base, node.mode, node.device, dir_fd=place)
            if node.uid or node.gid:
                os.chown(base, node.uid, node.gid, dir_fd=place)
            if parent:
                os.close(place)
        for name, target in LINKS:
            if name != "core" or os.path.exists(target):  # a kernel may be built without /proc/kcore
                os.symlink(target, name, dir_fd=dev)
        return _place_agent(plan.program, dev)
    finally:
        os.close(dev)


def _place_agent(program: int, dev: int) -> int:
    written = os.open(_AGENT, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o500, dir_fd=dev)
    offset = 0
    while count := os.sendfile(written, program, offset, 1 << 20):
        offset += count
    os.close(written)  # what is open for writing is not executed
    fd = os.open(_AGENT, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dev)
    os.unlink(_AGENT, dir_fd=dev)
    return fd


def sysctl_path(key: str) -> str:
    """Below /proc/sys. As in sysctl(8), a slash in the key stands for a dot in a name: net.ipv4.conf.eth0/5.mtu."""
    return key.translate({ord("."): "/", ord("/"): "."})


def _write_sysctl(key: str, value: str) -> None:
    fd = os.open("/proc/sys/" + sysctl_path(key), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _bind_ourselves(plan: Plan) -> None:
    """Give up what the agent does not need. Its programs give up more (guest/policy.c)."""
    os.setsid()
    with step("cannot drop capabilities"):
        capabilities.limit_bounding_set(plan.agent_capabilities)
        capabilities.drop_inheritable()
    if plan.no_new_privileges:
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    if plan.agent_seccomp:
        # Programs that may gain privileges cannot set no_new_privs, and without it a filter takes CAP_SYS_ADMIN,
        # which they lack: the agent gets the filter here, and they inherit it.
        with step("cannot install the system call filter"):
            seccomp.install(plan.agent_seccomp)


def _become_agent(plan: Plan, arguments: list[str], program: int, *, program_fd: int = -1, channel: int = -1) -> None:
    """Wait for the supervisor's word, put the descriptors in place, execute `program`. Returns only by raising."""
    if channel < 0:
        wait_for_go(plan.handshake)  # the supervisor has put our end of the network link here by then
        with step("cannot set up the network"):
            links.configure(plan.request.network)
        channel = offer_channel(plan.handshake)
    with step("cannot start the agent"):
        # Out of the way first: any of these may have one of the numbers that we need.
        moved = [_move_up(fd) for fd in (channel, program_fd, program)]
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in range(3):
            os.dup2(null, fd)
        os.dup2(moved[0], AGENT_FD)
        if program_fd >= 0:
            os.dup2(moved[1], PROGRAM_FD)
        process.execute_fd(moved[2], ["nagaya-agent", *arguments], [])


def offer_channel(handshake: int) -> int:
    """Give the supervisor its end of the agent's connection; the agent's. A socket belongs to the network namespace that it was
    made in, and CRIU looks for those of the machine's own.
    """
    theirs, ours = unix.socket_pair()
    try:
        unix.send_with_fds(handshake, json.dumps({"ready": True}).encode() + b"\n", (theirs,))
    except OSError:
        os._exit(1)  # the supervisor is gone
    os.close(theirs)
    return ours


def _move_up(fd: int) -> int:
    """A copy above 9, close-on-exec; -1 stays -1."""

    return fd if fd < 0 else int(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10))
