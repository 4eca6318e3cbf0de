"""The Engine protocol. An engine only boots: everything after that speaks to the agent that it connected.

Optional abilities are small protocols of their own (`Pausable`, `Measurable`, `Saving`, `Resizable`); callers find them
through `capabilities`, never by asking for an engine's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from nagaya.errors import NagayaError
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Drive, Limits, MachineSpec
from nagaya.net.plan import LinkPlan, NetworkPlan
from nagaya.static import NamedTuple, Protocol
from nagaya.storage.plan import DiskPlan, HardwarePlan, MountPlan, RootfsPlan


class Incoming(NamedTuple):
    """A machine that comes over a stream (`migration/`): its ends, and the engine's end of what it is told by.

    The descriptors are the caller's to close after the boot. `described` is what `Migrating.describe` has answered.
    """

    read_fd: int
    write_fd: int
    report_fd: int
    described: str

    @property
    def fds(self) -> tuple[int, int, int]:
        return self.read_fd, self.write_fd, self.report_fd


class BootRequest(NamedTuple):
    """All that a boot needs. The manager planned it; the engine carries it out."""

    spec: MachineSpec
    rootfs: RootfsPlan | DiskPlan | HardwarePlan  # as the engine's `rootfs_kind` says
    mounts: tuple[MountPlan, ...]  # spec.mounts with sources resolved to host paths, parents before children
    network: NetworkPlan
    etc: tuple[tuple[str, str], ...]  # (path inside, host file) to bind: /etc/hosts, /etc/hostname, /etc/resolv.conf
    runtime_dir: str  # private to this machine, for sockets
    saved: str = ""  # what `Saving.save` has written: go on from there, and do not boot. "" = boot
    incoming: Incoming | None = None  # take the machine from there, and do not boot


class Copy(NamedTuple):
    """A path of the host whose content the machine gets at `target` before its program starts."""

    source: str
    target: str
    is_directory: bool
    read_only: bool


class Booted(NamedTuple):
    """A machine whose agent answers. Descriptors belong to the caller."""

    pid: int  # the machine's init as the host sees it; for display, never to be signalled
    pidfd: int  # readable when the machine has ended
    agent: int  # connected stream socket or port to the agent, non-blocking; -1 where there is none, but a console
    policy: ProcessPolicy
    warnings: tuple[str, ...] = ()
    helpers: tuple[int, ...] = ()  # children of the engine's: the machine cannot be set up without them
    copies: tuple[Copy, ...] = ()  # what the supervisor is to copy in, for want of a way to share it
    console: int = -1  # connected stream to the serial console of a machine that has no agent
    setup: bytes = b""  # the agent's first frame, SETUP, where it has the machine's inside to set up itself
    # (for one that went on from what was saved too, and then not to be sent: its agent has had it)
    told: bool = False  # whether `setup` has been sent already
    origin: str = ""  # how it came to run, for `inspect`: "boot", "template", "saved"; "" = there is one way only
    watch: tuple[tuple[int, Callable[[], None]], ...] = ()  # while it runs: what to call when a descriptor is readable
    start_timeout_s: float = 30.0  # until the program must have been started
    end_timeout_s: float = 2.0  # from SHUTDOWN until the machine must be gone


class Stats(NamedTuple):
    """One reading. -1 = this host does not account for it."""

    cpu_ns: int = -1
    memory_bytes: int = -1
    memory_limit_bytes: int = -1
    pids: int = -1
    block_read_bytes: int = -1
    block_write_bytes: int = -1
    net_rx_bytes: int = -1
    net_tx_bytes: int = -1
    memory_private_bytes: int = -1  # of its processes': what no other process has
    memory_shared_bytes: int = -1  # and what others have too, each other or machines of the same template or fork
    memory_pss_bytes: int = -1  # private, and its part of what is shared: these add up over all machines


# What `inspect` tells of each type, in these words: an engine names in `missing` those that it lacks, and why.
FEATURES = (
    "pause",  # and unpause
    "memory",  # in snapshots
    "fork",  # with its programs
    "migrate",  # to another host, while it runs
    "stats",
    "limits",  # that change while the machine runs
    "offline",  # cp, diff, commit and export of a machine that does not run
    "devices",  # --device of this host
    "host-network",  # --network host
    "network-connect",  # to a further network while it runs
    "userns",  # --userns auto
    "seccomp-profile",  # --security-opt seccomp=PROFILE
    "cpuset",  # --cpuset-cpus
    "blkio",  # --blkio-weight
    "storage",  # --storage
    "own-kernel",
    "other-cpus",  # --platform
)


class Engine(Protocol):
    """One instance boots one machine at a time, inside that machine's supervisor."""

    type: str
    rootfs_kind: str  # "directories": boot wants a RootfsPlan; "disk": a DiskPlan; "hardware": a HardwarePlan
    # Subset of {"pause", "stats", "limits", "memory", "save-behind", "disk-log", "backing", "fork", "migrate", "post-copy", "oom", "offline", "init", "plug", "replug", "explain",
    # "power", "screen", "discs", "disks", "guest-agent"}.
    capabilities: frozenset[str]

    @property
    def missing(self) -> dict[str, str]:
        """Those of FEATURES that it lacks: why."""

    def boot(self, request: BootRequest, stack: ExitStack) -> Booted:
        """Start the machine's walls and its agent. What must be undone at the end is pushed on `stack`.

        Raises `HostError`, `Unsupported`, `UsageError`; on a raise nothing is left behind.
        """

    def check_host(self, *, kernel: str = "") -> None:
        """Raise `Unsupported` when this user on this host could boot nothing at all: known before an image is pulled.

        `kernel` is the path of the machine's own; "" = it boots ours.
        """

    def find_slowness(self) -> str:
        """What of this host makes its machines far slower than its type lets expect; "" for nothing."""

    def check(self, spec: MachineSpec) -> list[str]:
        """Raise `UsageError` or `Unsupported` for what this engine could not boot; answers warnings. Changes nothing."""

    def kill(self) -> None:
        """End every process of the machine at once; returns without waiting. Does nothing when it has ended."""

    def reclaim(self, machine_id: str, runtime_dir: str) -> None:
        """Free what a killed supervisor of `machine_id` left on the host, whose `BootRequest.runtime_dir` that was. Idempotent; called under its lock."""


class Pausable(Protocol):
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Measurable(Protocol):
    def stats(self) -> Stats: ...


class Saving(Protocol):
    """With the capability "memory"."""

    def why_not_save(self) -> str:
        """Why this host cannot save its machines' memory although the type can; "" = it can. Engines may do without it."""

    def save(self, directory: str) -> None:
        """Write the machine's memory and its devices' state into `directory`, which exists and is empty.

        The machine is paused, by the caller, and stays so. What is on its disks is not in it: they are copied at the same
        pause. `BootRequest.saved` names such a directory, in which nothing changes any more. Machines that go on from
        one directory share its memory copy-on-write: a fork is a `save` to a tmpfs, and a boot from it for each copy; the
        directory may be removed when all of them have booted.

        Raises `HostError` (a full disk, say) and `Conflict` when the machine is not paused; what was written is the
        caller's to remove then. A boot from it raises `IntegrityError` for a damaged one, and `Unsupported` for one of
        another version, CPU, KVM, or of other devices than the request's machine has.
        """

    def check_saved(self, spec: MachineSpec, directory: str) -> None:
        """Raise what a boot of `spec` from `directory` would, as far as can be told beforehand: a machine may still run
        whose place it is to take. The files' sums have been compared. Changes nothing.
        """


class Preloading(Protocol):
    """An engine that many machines at a time are started with, by one process."""

    def preload(self) -> None:
        """Import what each start would import."""


class Writing(Protocol):
    """A save under way, which a child of the machine's writes."""

    fd: int
    """Readable when it has ended."""

    def finish(self) -> None:
        """Wait for its end; what it wrote is whole then. Raises `HostError`, `RemoteError` when the writer was killed."""

    def close(self) -> None:
        """Before `finish`: give it up. May be called twice."""


class SavingBehind(Protocol):
    """With the capability "save-behind": the machine stands for its state alone, and not for the size of its memory."""

    def begin_save(self, directory: str, *, base: str = "") -> Writing:
        """As `Saving.save`, but the machine may go on when this returns: what it was is written meanwhile.

        With `base`, a directory that was saved of this machine before, what differs from that may be all that is written:
        `directory` is worth nothing without it then.
        """

    def find_base(self, directory: str) -> str:
        """What `directory` is worth nothing without: another such directory, or ""."""

    def fold_base(self, directory: str, target: str) -> None:
        """Write into the empty `target` what `directory` and its base are together, which takes its place."""


class DiskLogging(Protocol):
    """With the capability "disk-log": the data disk can be copied while the machine writes to it."""

    def log_disk(self, on: bool) -> None:
        """Begin to note where the data disk is written, or stop it."""

    def take_disk_log(self) -> list[tuple[int, int]]:
        """(offset, bytes) of what has been written since the last time. Of a paused machine it is all that there will be."""


class Migrating(Protocol):
    """With the capability "migrate". `BootRequest.incoming` is the other side of it."""

    def describe(self) -> str:
        """JSON of what the machine is made of, for the target's engine. Raises `RemoteError`, `HostError`."""

    def check_described(self, spec: MachineSpec, described: str) -> None:
        """Raise `Unsupported`, `IntegrityError` when no machine that was described so could go on here as `spec`."""

    def leave(self, stream: tuple[int, int], report_fd: int, *, max_downtime_ms: int, post_copy: bool) -> None:
        """Begin to send the machine to the target at the other end of `stream`, which has accepted it.

        All else is said over `report_fd` (supervisor/leaving.py has the words). The descriptors are the caller's to close.
        """

    def recover(self) -> bool:
        """It goes on here after all, and what moved it has said so, or has ended: put right what that has left. False when
        there is nothing to go on with, for the machine was that process's. May be called twice. Raises nothing.
        """


class Resizable(Protocol):
    def set_limits(self, limits: Limits) -> tuple[str, ...]:
        """Make these the machine's. Sentences on what else there is to do. Raises `Unsupported`, `Conflict`, `HostError`."""


class Pluggable(Protocol):
    """Of the capability "plug": network links that come and go while the machine runs."""

    def plug(self, link: LinkPlan) -> None:
        """Connect the machine to what the host has prepared. Raises `HostError`; it has no such link then."""

    def unplug(self, link: LinkPlan) -> None:
        """The host has taken its end of the link away. Raises `HostError`."""

    def route(self, link: LinkPlan) -> None:
        """A link that the machine has is the way out from now on. Raises `HostError`."""


class Replugging(Protocol):
    """Of the capability "replug": the cards that the machine was started with, each of which can be on another network."""

    def replug(self, link: LinkPlan) -> None:
        """Connect the card of that name, which is on no network, to what the host has prepared. Raises `HostError`."""

    def plan_renewal(self, links: tuple[LinkPlan, ...], files: tuple[tuple[str, bytes, bytes], ...]) -> bytes:
        """What the agent's `renew` reads, so that its inside follows: links that have changed, of which one without addresses
        is off, and files, each with its path, what it was told to have and what it is to have. Raises `UsageError`.
        """


class OomAware(Protocol):
    def oom_killed(self) -> bool:
        """Whether the kernel has killed a process of the machine for want of memory."""


class Explaining(Protocol):
    def explain_end(self, ended: os.waitid_result | None) -> NagayaError | None:
        """Why the machine ended although nobody had asked for it, where there is more to say than that it did.

        `ended` is how its process did; None when another has reaped it.
        """


class Powered(Protocol):
    """A whole machine, which has buttons instead of an agent."""

    def power_down(self) -> None:
        """Press the power button: a system that heeds it ends in good order."""

    def quit(self) -> None:
        """Switch it off; what it has written is brought to its disks first."""


class DiscChanging(Protocol):
    """A machine whose CD drives can get another disc while it runs."""

    def change_disc(self, number: int, path: str, format: str) -> None:
        """Put the image at `path` ("" = none) into drive `number` of the record, whatever the system holds shut."""


class DiskChanging(Protocol):
    """Of the capability "disks": a machine whose disks come, go and grow while it runs."""

    def plug_disk(self, drive: Drive, path: str, *, allowed: tuple[str, ...]) -> None:
        """Plug the image at `path` into `drive.slot`. Its backing files may lie in `allowed`, too."""

    def unplug_disk(self, drive: Drive) -> None:
        """Take it out. Raises `Conflict` when the system does not let go of it."""

    def resize_disk(self, drive: Drive, number: int, size_bytes: int) -> None:
        """Make the drive with that number in the record larger."""


class Quiescing(Protocol):
    """Of the capability "guest-agent": a whole machine in whose system QEMU's agent may run."""

    def freeze(self) -> bool:
        """Have its file systems written out, and no more written to; False where no agent is. Raises `RemoteError`, after
        which they may be frozen all the same.
        """

    def thaw(self) -> None:
        """Let them be written to again."""

    def find_guest_links(self) -> list[dict[str, object]] | None:
        """Name, MAC and addresses of its network interfaces, as its system says; None where no agent is."""


class Screened(Protocol):
    """A machine with a screen and a keyboard."""

    def screenshot(self, format: str) -> bytes:
        """What the screen shows, as "png" or "ppm"."""

    def press_keys(self, words: tuple[str, ...], text: str) -> None:
        """Press the keys that `words` name, then type `text`. Raises `UsageError` for what is no key."""


class Offline(Protocol):
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
        """Run one of the agent's functions on the root of a machine that is not running; the process's pid.

        With `data_disk` on the machine's own disk, as overlayfs keeps it there: `/upper` is what it has changed.
        """
