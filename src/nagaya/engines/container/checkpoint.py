"""A container's programs taken out of the kernel into files, and brought back: by CRIU (criu(8)), where the host has it.

The whole tree of processes from the agent on, with its namespaces. Outside of it, and told to CRIU anew when it is brought
back, are: the network namespace, which the engine makes and connects as for a boot; what is mounted from the host; the agent's
connection to its supervisor; the control group, which CRIU is started in. Connections over TCP come back closed.

    DIRECTORY/*.img            CRIU's own
              container.json   `Record`
"""

from __future__ import annotations

import os
import signal

from nagaya import __version__
from nagaya.engines.base import BootRequest
from nagaya.engines.cgroups.group import Cgroup
from nagaya.engines.container import boot, rootfs
from nagaya.engines.container.criu import find_criu
from nagaya.errors import HostError, IntegrityError, Unsupported
from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces, process
from nagaya.model.spec import MachineSpec
from nagaya.net import links
from nagaya.static import NamedTuple, NoReturn
from nagaya.storage import records
from nagaya.storage.plan import RootfsPlan

FORMAT = 1
RECORD = "container.json"
_GHOST_LIMIT = "64M"  # of a file that has no name any more
_LOG = "criu.log"
_NETWORK, _AGENT = "network", "agent"
_LOG_END_BYTES = 1 << 16


class Record(NamedTuple):
    """What CRIU's files do not tell us."""

    format: int
    version: str  # of the Nagaya whose agent is in it
    machine_id: str
    socket: int  # inode of the agent's
    mounts: tuple[str, ...]  # targets of what the host has mounted in it, in the order of their names for CRIU


def refuse(spec: MachineSpec) -> None:
    """Raise `Unsupported` for what cannot be taken out, or brought back, as we make it."""
    if not find_criu():
        raise Unsupported(
            "CRIU, which takes a container's programs out of the kernel, is not installed", hint="apt install criu"
        )
    for found, what in (
        (spec.userns == "auto", "with a user namespace"),
        (not spec.init, "whose program is its own init (--init=false)"),
        (bool(spec.devices), "with devices of the host"),
    ):
        if found:
            raise Unsupported(
                f"the memory of a container {what} cannot be saved", hint="--type kvm saves whole machines"
            )


# -- out


def save(spec: MachineSpec, pid: int, cgroup: Cgroup, mounts: tuple[str, ...], directory: str, workspace: str) -> None:
    """Write the processes from the init `pid` on, which stand in their control group and stay so, into the empty `directory`.

    `workspace` is for CRIU's log. Raises `Unsupported` with CRIU's reason when it cannot, `HostError`.
    """
    refuse(spec)
    socket = _inode(os.readlink(f"/proc/{pid}/fd/{boot.AGENT_FD}"))
    argv = [
        find_criu(), "dump", "--tree", str(pid), "--images-dir", directory, "--work-dir", workspace, "--log-file", _LOG,
        "--leave-running", "--freeze-cgroup", cgroup.freezer_path(), *_COMMON, "--external", f"unix[{socket}]",
    ]  # fmt: skip
    if spec.network != "host":
        argv += ["--external", f"net[{_inode(os.readlink(f'/proc/{pid}/ns/net'))}]:{_NETWORK}"]
    for number, target in enumerate(mounts):
        argv += ["--external", f"mnt[{target}]:{_mount_name(number)}"]
    child = os.posix_spawn(argv[0], argv, _ENVIRONMENT, file_actions=_silent())
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise Unsupported(
            f"CRIU cannot save this container's programs: {_last_error(workspace)}",
            hint="--type kvm saves whole machines",
        )
    records.store(f"{directory}/{RECORD}", Record(FORMAT, __version__, spec.id, socket, mounts))


_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_COMMON = ("--manage-cgroups=ignore", "--file-locks", "--tcp-close", "--ghost-limit", _GHOST_LIMIT)


def _inode(link: str) -> int:
    """Of "socket:[4711]"."""
    return int(link.partition("[")[2].rstrip("]"))


def _mount_name(number: int) -> str:
    return f"mount{number}"


def _silent() -> list[tuple[object, ...]]:
    return [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]


def _last_error(workspace: str) -> str:
    """What CRIU's log says last of an error, without its time and its place in the source."""
    try:
        with open(f"{workspace}/{_LOG}", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_END_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "it left no log"
    errors = [text.strip() for line in lines if (text := line.partition("Error (")[2])]
    # The first is the cause, those after it what that led to; what begins every log of a plain container is neither.
    causes = [text.partition("): ")[2] or text for text in errors if "RLIMIT_NOFILE" not in text]
    return causes[0] if causes else "it does not say why"


# -- and back


def check(spec: MachineSpec, directory: str) -> None:
    """Raise what can be said against a restore beforehand: `Unsupported`, `IntegrityError`."""
    refuse(spec)
    load(spec, directory)


def load(spec: MachineSpec, directory: str) -> Record:
    try:
        record = records.load(f"{directory}/{RECORD}", Record)
    except FileNotFoundError:
        raise IntegrityError("the saved container's record is missing") from None
    if record.format != FORMAT:
        raise Unsupported(f"the container was saved in format {record.format}, and this Nagaya knows {FORMAT}")
    if record.version != __version__:
        raise Unsupported(
            f"the container was saved by Nagaya {record.version}, and this is {__version__}",
            hint="restore it without its memory (--no-memory): its program then starts anew",
        )
    if record.machine_id != spec.id:
        raise Unsupported(
            "a container's saved programs go on in the machine that they were saved of, and in no other",
            hint="restore it without its memory (--no-memory): its program then starts anew",
        )
    return record


class Plan(NamedTuple):
    """What the child needs, worked out before the fork."""

    request: BootRequest
    layout: RootfsPlan
    cgroup: Cgroup
    sources: tuple[tuple[str, str], ...]  # (target, path on the host) of what is mounted from there
    record: Record
    handshake: int
    workspace: str


def run(plan: Plan) -> NoReturn:
    """In a forked child: make what is outside of the programs, then execute CRIU. Never returns."""
    try:
        _prepare(plan)
    except BaseException as error:
        boot.tell_failure(plan.handshake, error)
    finally:
        os._exit(1)


def _prepare(plan: Plan) -> None:
    request, layout = plan.request, plan.layout
    process.close_all_but((plan.handshake,))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with boot.step("cannot enter the control group"):
        plan.cgroup.enter()
    process.new_session_keyring()
    with boot.step("cannot make a mount namespace"):
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)  # criu(8), --root
    target = f"{os.path.dirname(layout.upper)}/rootfs"
    with boot.step("cannot mount the root file system"):
        rootfs.prepare(layout)
        os.makedirs(target, 0o755, exist_ok=True)
        mount_root = rootfs.mount_copy if rootfs.has_copy(layout) else rootfs.mount_overlay
        os.close(mount_root(layout, target))
    with boot.step("cannot make the machine's namespaces"):
        own_network = request.network.kind != "host"
        namespaces.unshare(namespaces.CLONE_NEWCGROUP | (namespaces.CLONE_NEWNET if own_network else 0))
    boot.tell(plan.handshake, pid=0)
    boot.wait_for_go(plan.handshake)
    with boot.step("cannot set up the network"):
        links.configure(request.network)
    channel = boot.offer_channel(plan.handshake)
    argv = [
        find_criu(), "restore", "--images-dir", request.saved, "--work-dir", plan.workspace, "--log-file", _LOG,
        "--pidfile", f"{plan.workspace}/criu.pid", "--restore-detached", "--restore-sibling", "--root", target, *_COMMON,
        "--inherit-fd", f"fd[{_inheritable(channel)}]:socket:[{plan.record.socket}]",
    ]  # fmt: skip
    if own_network:
        network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        argv += ["--inherit-fd", f"fd[{_inheritable(network)}]:{_NETWORK}"]
    paths = dict(plan.sources)
    for number, inside in enumerate(plan.record.mounts):
        argv += ["--external", f"mnt[{_mount_name(number)}]:{paths[inside]}"]
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in range(3):
        os.dup2(null, fd)
    with boot.step("cannot start CRIU"):
        os.execve(argv[0], argv, _ENVIRONMENT)


def _inheritable(fd: int) -> int:
    os.set_inheritable(fd, True)
    return fd


def await_restored(child: int, workspace: str) -> int:
    """CRIU has been started as `child`: wait for its end. The restored init's pid, a child of ours that runs. Raises `HostError`."""
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise HostError(
            f"CRIU cannot bring the saved programs back: {_last_error(workspace)}",
            operation="restore", hint="restore the snapshot without its memory (--no-memory)",
        )  # fmt: skip
    with open(f"{workspace}/criu.pid", encoding="ascii") as file:
        return int(file.read())
