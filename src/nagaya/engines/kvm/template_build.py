"""Building a template: boot on empty disks until the agent is there, or go on from a bare one and have the agent prepare.

In a process of its own, with as few rights as a machine's. Whatever is killed leaves a directory that the next build
removes; a template has its name when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from nagaya.engines.kvm import saved, template
from nagaya.engines.kvm.assembly import Hardware
from nagaya.engines.kvm.devices import SHARES, card_name, plan_devices
from nagaya.engines.kvm.machine import Machine
from nagaya.engines.kvm.template import Mold, Prepared
from nagaya.engines.vm.parts import FIRST_ID, open_initramfs
from nagaya.engines.vm.setup import AGENT_PORT, DATA_SERIAL, ROOT_SERIAL
from nagaya.engines.vm.shares import TAG as SHARES_TAG
from nagaya.errors import HostError, LaunchError, NagayaError
from nagaya.kernel import unix
from nagaya.kernel.process import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, become, close_all_but, die_with, prctl
from nagaya.protocol.agent import HELLO, PREPARE, PREPARED
from nagaya.protocol.frame import Decoder, Frame, encode
from nagaya.protocol.setup import GuestNetwork, GuestSetup, bound_payload, setup_payload, warm_payload
from nagaya.static import NoReturn
from nagaya.storage.disks import DEFAULT_BYTES, create_data_disk
from nagaya.storage.lock import FileLock
from nagaya.storage.paths import make_directory
from nagaya.storage.tree import remove_tree

WITHIN_S = 600.0  # a software KVM on a busy host
SETTLE_S = 4.0  # in which the guest tells of its free pages, and ends what its boot has begun
_PLACEHOLDER_BYTES = 1 << 20
_NICE = 10
_PATIENT_MS = 1000
# Files that most programs of an image begin with: they are in memory then.
WARM = (
    "/bin/sh", "/bin/busybox", "/bin/bash", "/bin/true", "/bin/sleep", "/lib64/ld-linux-x86-64.so.2",
    "/lib/x86_64-linux-gnu/libc.so.6", "/lib/x86_64-linux-gnu/libtinfo.so.6", "/lib/ld-musl-x86_64.so.1",
    "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache",
)  # fmt: skip


def build_later(mold: Mold) -> None:
    """Have it built by a process that nobody waits for, unless somebody builds already."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            os.nice(_NICE)
            close_all_but((), first=0)
            for _ in range(3):
                os.open("/dev/null", os.O_RDWR)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            os.chdir("/")
            build(mold, wait=False)
    except NagayaError:
        pass  # it is noted with the template that did not come to be
    finally:
        os._exit(0)


def build(mold: Mold, *, wait: bool = True, report: Callable[[str], None] = lambda text: None) -> str:
    """Its directory, built if need be; "" when another build is going on and `wait` is off.

    Raises `LaunchError` when it could not be built, and `HostError`.
    """
    place = template.directory()
    try:
        make_directory(place)
        lock = FileLock(f"{place}/lock")
        if not lock.acquire(wait=wait):
            return ""
        with lock:
            template.prune(most=template.MOST - 1)
            return _build(mold, report)
    except OSError as error:
        raise HostError.from_os(error, "cannot build the template") from None


def prune_all() -> list[str]:
    """What nobody can begin from any more: other kernels', agents' and versions'; the ids. Raises `HostError`."""
    place = template.directory()
    try:
        make_directory(place)
        with FileLock(f"{place}/lock"):
            dead = [one.id for one in template.list_templates() if not template.is_current(one)]
            for name in dead:
                template.remove(name)
            template.prune(most=template.MOST)
    except OSError as error:
        raise HostError.from_os(error, "cannot prune the templates") from None
    return dead


def _build(mold: Mold, report: Callable[[str], None]) -> str:
    found = template.find(mold)
    if found:
        return found
    base = ""
    if mold.prepared is not None:
        base = _build(mold._replace(prepared=None), report)
    name = template.make_id(mold.key)
    report(f"building the template {name}: " + ("mounting the image's root" if base else "booting its kernel"))
    stage = f"{template.directory()}/build.{os.getpid()}"
    remove_tree(stage)
    os.mkdir(stage, 0o700)
    failed = f"{template.directory()}/{name}.failed"
    try:
        problem = _run(mold, base, stage)
        if problem:
            with open(failed, "w", encoding="utf-8") as file:
                file.write(problem)
            raise LaunchError(f"the template could not be built: {problem}")
        template.remove(name)  # a damaged one
        os.rename(stage, f"{template.directory()}/{name}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(failed)
    finally:
        remove_tree(stage)
    return f"{template.directory()}/{name}"


def _run(mold: Mold, base: str, stage: str) -> str:
    """Build it in `stage`, in a process of its own; why that failed, or ""."""
    read, write = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _make(mold, base, stage, write, parent)
    os.close(write)
    try:
        said = b""
        while data := os.read(read, 4096):
            said += data
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # our child, and not waited for: the pid is still its own
        os.waitpid(pid, 0)
    problem = said.decode(errors="replace")
    if problem != "done":
        return problem or "its VMM was killed"
    if os.geteuid() == 0:
        for file in os.scandir(stage):
            os.chown(file.path, 0, 0, follow_symlinks=False)
        os.chown(stage, 0, 0)
    return ""


def _make(mold: Mold, base: str, stage: str, write: int, parent: int) -> NoReturn:
    """In the child; never returns."""
    import gc

    said = "done"
    try:
        gc.disable()
        os.setpgid(0, 0)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        _Build(mold, base, stage, parent).run()
    except NagayaError as error:
        said = error.message
    except OSError as error:
        said = f"{error.strerror or error}"
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        said = f"the builder broke ({type(error).__name__})"
    finally:
        os.write(write, said.encode(errors="replace"))
        os._exit(0)


class _Build:
    def __init__(self, mold: Mold, base: str, stage: str, parent: int) -> None:
        self._mold, self._base, self._stage, self._parent = mold, base, stage, parent
        self._key = mold.key  # now, with the right to look at its files
        self._console = self._agent = -1
        self._said = b""
        self._frames: list[Frame] = []
        self._decoder = Decoder()
        self._deadline_s = time.monotonic() + WITHIN_S

    def run(self) -> None:
        mold = self._mold
        os.chdir(self._stage)  # the way there may be closed to the user that we become
        with ExitStack() as stack:
            found = None
            if self._base:
                found = template.open_template(self._base, mold._replace(prepared=None))
                if found is None:
                    raise LaunchError("the bare template was damaged")
                stack.callback(found.close)
            root, data = self._make_disks(mold.prepared)
            machine = self._assemble(root, data, found)
            stack.callback(machine.close)
            machine.make()
            self._give_up_rights()
            machine.start()
            if found is None:
                hello = self._await(machine, HELLO)
            else:
                hello = Frame(HELLO, 0, bytes.fromhex(found.state["notes"]["hello"]))
            if mold.prepared is not None:
                self._prepare(machine, mold.prepared)
            self._settle(machine)
            machine.pause()
            prepared = mold.prepared
            machine.save(
                ".",
                notes={
                    "key": self._key, "hello": hello.payload.hex(), "cards": " ".join(mold.cards),
                    "shares": mold.shares, "image": prepared.image if prepared is not None else "",
                },
            )  # fmt: skip
        for path in (root, data) if mold.prepared is None else ():
            os.unlink(os.path.basename(path))

    def _make_disks(self, prepared: Prepared | None) -> tuple[str, str]:
        data = f"{self._stage}/{template.DATA}"
        if prepared is not None:
            create_data_disk(data, prepared.data_bytes)
            return prepared.image, data
        root = f"{self._stage}/root"
        for path, size in ((root, _PLACEHOLDER_BYTES), (data, DEFAULT_BYTES)):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(fd, size)
            os.close(fd)
        return root, data

    def _assemble(self, root: str, data: str, found: saved.Saved | None) -> Machine:
        from nagaya.virtio.blk import Blk
        from nagaya.virtio.console import Port

        mold = self._mold
        self._console, console = unix.socket_pair()
        self._agent, agent = unix.socket_pair()
        for fd in (self._console, self._agent, console, agent):
            os.set_blocking(fd, False)
        ports = (
            Port("console", console=True, input_fd=console, output_fd=console),
            Port(AGENT_PORT, input_fd=agent, output_fd=agent),
        )
        disks = (Blk(ROOT_SERIAL, root, read_only=True, serial=ROOT_SERIAL), Blk(DATA_SERIAL, data, serial=DATA_SERIAL))
        devices = plan_devices(ports, disks)
        for number, card in enumerate(mold.cards):
            from nagaya.virtio.net import Net
            from nagaya.virtio.net_link import Unplugged

            mac = template.placeholder_mac(number)
            devices.append(Net(card_name(number), Unplugged(like_tap=card == "tap"), mac=mac, mtu=1500))
        if mold.shares:
            from nagaya.virtio.fs import FileSystem, Nobody

            devices.append(FileSystem(SHARES, Nobody(), tag=SHARES_TAG))
        initrd = open_initramfs()
        hardware = Hardware(
            kernel=mold.kernel, initrd=f"/proc/self/fd/{initrd}", command_line=mold.command_line,
            memory_bytes=mold.memory_bytes, cpus=mold.cpus, acpi=False,
        )  # fmt: skip
        return Machine(hardware, tuple(devices), saved=found)

    def _give_up_rights(self) -> None:
        if os.geteuid() == 0:
            for path in (self._stage, *(file.path for file in os.scandir(self._stage))):
                os.chown(path, FIRST_ID, FIRST_ID)
            become(FIRST_ID)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        die_with(self._parent)  # once more: who changes its ids loses it

    def _prepare(self, machine: Machine, prepared: Prepared) -> None:
        mac = template.placeholder_mac(0).hex(":")
        networks = (GuestNetwork(mac, "", 0, "", prepared.mtu),) if self._mold.cards else ()
        payload = setup_payload(
            GuestSetup(
                "", read_only=prepared.read_only, unmask=prepared.unmask, own_pids=prepared.own_pids, pids=prepared.pids,
                power_off="port", files=tuple((path, b"") for path in prepared.files), networks=networks,
            )
        )  # fmt: skip
        beside = warm_payload(WARM) + bound_payload(prepared.capabilities)
        data = memoryview(encode(PREPARE, 0, payload + beside))
        while data:
            try:
                data = data[os.write(self._agent, data) :]
            except BlockingIOError:
                self._listen(machine)
        answer = self._await(machine, PREPARED)
        if int.from_bytes(answer.payload[:4], "little"):
            raise LaunchError(answer.payload[4:].decode(errors="replace"))

    def _await(self, machine: Machine, kind: int) -> Frame:
        while not self._frames:
            self._listen(machine)
        frame = self._frames.pop(0)
        if frame.type != kind:
            text = frame.payload[4:].decode(errors="replace")
            raise LaunchError(f"its agent answered with frame {frame.type}: {text}")
        return frame

    def _listen(self, machine: Machine, wait_ms: int = _PATIENT_MS) -> None:
        if time.monotonic() > self._deadline_s:
            raise LaunchError(f"its agent was not there within {WITHIN_S:.0f} s")
        poll = select.poll()
        for fd in (self._console, self._agent):
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(wait_ms):
            with contextlib.suppress(BlockingIOError):
                data = os.read(fd, 65536)
                if fd == self._agent:
                    self._frames += self._decoder.feed(data)
                else:
                    self._said = (self._said + data)[-4096:]
        ending = machine.wait(0)
        if ending is not None:
            last = self._said.decode(errors="replace").strip().splitlines()
            raise LaunchError(f"its machine ended: {ending.reason}" + (f"; {last[-1]}" if last else ""))

    def _settle(self, machine: Machine) -> None:
        """Until it has nothing more to do. Free pages are reported two seconds after they were freed."""
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end:
            self._listen(machine, 200)
