"""What the walls cost, measured on the spot: one image as each type of machine, and this host without any.

A start is a whole `nagaya run`, from the command to the program's first byte. The other figures are those of the agent's
`bench` (guest/bench.c): the same program measures inside each machine and on the bare host.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from nagaya.engines import TYPES, open_engine
from nagaya.engines.vm.agent import agent_path
from nagaya.errors import HostError, LaunchError, NagayaError, NotFound, RemoteError, UsageError
from nagaya.manager.host import Host
from nagaya.manager.machine import Machine
from nagaya.manager.options import CreateOptions
from nagaya.model.state import RUNNING
from nagaya.net.plan import USER_ADDRESS, USER_GATEWAY
from nagaya.static import IO, NamedTuple

BARE = "host"
# Says that it runs, and stays until its input ends: `read` is the shell's own.
PROGRAM = ("sh", "-c", "echo; read line")
LEAST_STARTS, MOST_STARTS = 3, 10
STARTS_FOR_S = 20.0  # seconds after which no further start is begun
SAMPLES = 5
SAMPLE_MS = "200"
START_WITHIN_S = 180.0
BENCH_WITHIN_S = 180.0
SETTLE_S = 0.5  # what a machine's memory is read after: it has begun to wait by then


class Measure(NamedTuple):
    """`unit`: s (seconds), B (bytes) or what is counted; `rate`: so much of it in a second, more being better."""

    key: str
    title: str
    unit: str
    rate: bool


MEASURES = (
    Measure("start", "start to first output", "s", False),
    Measure("cpu", "CPU-bound work", "steps", True),
    Measure("memory", "memory copied", "B", True),
    Measure("syscall", "one system call", "s", False),
    Measure("write", "file written and synced", "B", True),
    Measure("files", "small files made, removed", "files", True),
    Measure("network", "network round trip", "s", False),
    Measure("resident", "resident memory", "B", False),
)
_BENCHES = ("cpu", "memory", "syscall", "write", "files", "network")
_SCALE = {"syscall": 1e-9, "network": 1e-6}  # what `bench` prints, in seconds


class Column(NamedTuple):
    """One place's samples by measure, what the bare host did in turn with them, and why there are none of the others.

    A shared host is quick now and slow then: `beside` is what a column's figures are to be compared with.
    """

    name: str  # BARE or a machine type
    samples: dict[str, tuple[float, ...]]
    beside: dict[str, tuple[float, ...]]
    missing: dict[str, str]


class Comparison(NamedTuple):
    columns: tuple[Column, ...]  # BARE first
    left_out: dict[str, str]  # types that this host does not run, or slowly, and why


Report = Callable[[str], None]
Bench = Callable[[tuple[str, ...]], str]


def compare(
    host: Host,
    image: str,
    *,
    types: tuple[str, ...] = (),
    network: str = "bridge",
    starts: int = 0,
    slow: bool = False,
    report: Report,
) -> Comparison:
    """Measure `image` as each of `types` (none: as all that this host runs), and the bare host in turn with each.

    `starts` per type (0: 3 to 10, by what they take). A type that this host makes slow, which takes ten minutes, is measured
    when it is named, or with `slow`. Raises what stands in the way of a type that was named, and of the last one that was left.
    """
    for type_ in types:
        open_engine(type_)
    columns: list[Column] = []
    left_out: dict[str, str] = {}
    for type_ in types or TYPES:
        try:
            if not types and not slow and (reason := open_engine(type_).find_slowness()):
                left_out[type_] = f"{reason}: it takes ten minutes more, with --slow"
                continue
            columns.append(_measure(host, image, type_, network, starts, report))
        except NagayaError as error:
            if types or isinstance(error, (NotFound, UsageError)) or (not columns and type_ == TYPES[-1]):
                raise
            left_out[type_] = error.message
    bare: dict[str, tuple[float, ...]] = {}
    for column in columns:
        for key, values in column.beside.items():
            bare[key] = bare.get(key, ()) + values
    return Comparison((Column(BARE, bare, {}, {}), *columns), left_out)


class _Samples:
    """What has been measured of one type so far."""

    def __init__(self) -> None:
        self.own: dict[str, list[float]] = {}
        self.beside: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}

    def take(self, key: str, bare: Callable[[], float], own: Callable[[], float]) -> None:
        """One sample of each, the host's first. What fails once is missing, and is not tried again."""
        if key in self.missing:
            return
        try:
            pair = bare(), own()
        except NagayaError as error:
            self.missing[key] = error.message
        except OSError as error:
            self.missing[key] = error.strerror or str(error)
        else:
            self.add(key, *pair)

    def add(self, key: str, bare: float, own: float) -> None:
        self.beside.setdefault(key, []).append(bare)
        self.own.setdefault(key, []).append(own)


def _measure(host: Host, image: str, type_: str, network: str, starts: int, report: Report) -> Column:
    report(f"{type_}: preparing the image")
    # Whatever is done once for an image, and whatever this host refuses, comes before the first start.
    host.machines.create(CreateOptions(image, command=PROGRAM, type=type_, network="none")).remove(volumes=True)
    samples = _Samples()
    began = time.monotonic()
    number, last = 0, False
    while not last:
        number += 1
        report(f"{type_}: start {number}")
        with _started(PROGRAM) as (process, bare_s), _run(host, image, type_, network) as (machine, own_s):
            samples.add("start", bare_s, own_s)
            time.sleep(SETTLE_S)
            bare_pid, own_pid = process.pid, machine.state.pid
            samples.take("resident", lambda: _proportional_bytes(bare_pid), lambda: _machine_bytes(own_pid))  # noqa: B023
            spent_s = time.monotonic() - began
            last = number >= (starts or MOST_STARTS) or (
                not starts and number >= LEAST_STARTS and spent_s > STARTS_FOR_S
            )
            if last:
                _measure_work(host, machine, samples, report)
    return Column(
        type_, {key: tuple(values) for key, values in samples.own.items()},
        {key: tuple(values) for key, values in samples.beside.items()}, samples.missing,
    )  # fmt: skip


def _measure_work(host: Host, machine: Machine, samples: _Samples, report: Report) -> None:
    """The agent's `bench`, in turn on the host and in the machine."""
    with ExitStack() as stack:
        peers = _open_peers(machine.state.address, stack)
        if peers is None:
            samples.missing["network"] = "the machine has no address"
        places = (host.paths.root,), ("/",)
        for key in _BENCHES:
            report(f"{machine.spec.type}: {key}")
            bare, own = peers or ((), ()) if key == "network" else places if key in ("write", "files") else ((), ())
            for _ in range(SAMPLES):
                samples.take(
                    key,
                    lambda key=key, bare=bare: _figure(key, _bench_here(("bench", key, "1", SAMPLE_MS, *bare))),  # type: ignore[misc]
                    lambda key=key, own=own: _figure(key, _bench_in(machine, ("bench", key, "1", SAMPLE_MS, *own))),  # type: ignore[misc]
                )


def _open_peers(address: str, stack: ExitStack) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """(address, port) to call from the host, and from the machine, whose own address is given."""
    if not address:
        return None
    near, far = ("127.0.0.1", USER_GATEWAY) if address == USER_ADDRESS else (_gateway(address),) * 2
    port = str(stack.enter_context(_echo(near)))
    return (near, port), (far, port)


def _gateway(address: str) -> str:
    """The bridge's own address: the first of the machine's /16 (net.addresses)."""
    first, second, *_ = address.split(".")
    return f"{first}.{second}.0.1"


def _bench_here(argv: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            (agent_path(), "--applet", *argv), capture_output=True, text=True, timeout=BENCH_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"'{' '.join(argv[:2])}' did not end within {BENCH_WITHIN_S:.0f} s") from None
    if done.returncode:
        raise HostError(done.stderr.strip(), operation=argv[1])
    return done.stdout


def _bench_in(machine: Machine, argv: tuple[str, ...]) -> str:
    with machine.applet(argv) as attachment:
        status, out, err = attachment.communicate(timeout_s=BENCH_WITHIN_S)
    if status:
        raise RemoteError(err.decode(errors="replace").strip() or f"status {status}")
    return out.decode("ascii", "replace")


def _figure(key: str, text: str) -> float:
    return _number(text) * _SCALE.get(key, 1.0)


def _number(text: str) -> float:
    """A figure, which is a guest's word. Raises `RemoteError`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e18:
        raise RemoteError("the machine's agent answered nonsense to 'bench'")
    return value


# -- starts


@contextmanager
def _started(argv: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A program that runs until the end of the block, and the seconds until its first byte of output."""
    with tempfile.TemporaryFile() as complaints:
        began = time.monotonic()
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints)
        assert process.stdout is not None
        try:
            ready = select.select([process.stdout], [], [], START_WITHIN_S)[0]
            first = os.read(process.stdout.fileno(), 1) if ready else b""
            seconds = time.monotonic() - began
            if not first:
                raise LaunchError(_complaint(complaints) or f"no output within {START_WITHIN_S:.0f} s", command=argv[0])
            yield process, seconds
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(BENCH_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _complaint(file: IO[bytes]) -> str:
    """The first line of what a nagaya wrote on its standard error, without its name."""
    file.seek(0)
    lines = file.read(4096).decode(errors="replace").splitlines()
    wanted = [line for line in lines if line.startswith("nagaya: ")] or lines
    return wanted[0].removeprefix("nagaya: ") if wanted else ""


@contextmanager
def _run(host: Host, image: str, type_: str, network: str) -> Iterator[tuple[Machine, float]]:
    """A machine as `nagaya run` makes it, removed at the end of the block, and the seconds to its first output."""
    reach = (
        () if network in ("none", "host") else ("--allow-host",)
    )  # the round trip's other end is a program of this host
    with tempfile.TemporaryDirectory(prefix="nagaya-compare-") as scratch:
        cidfile = f"{scratch}/id"
        argv = (
            sys.executable, "-m", "nagaya", "--root", host.paths.root, "--run-dir", host.paths.run, "run", "--rm", "-i",
            "--quiet", "--pull", "never", "--type", type_, "--network", network, *reach, "--cidfile", cidfile,
            image, *PROGRAM,
        )  # fmt: skip
        machine = None
        try:
            with _started(argv) as (_, seconds):
                with open(cidfile, encoding="ascii") as file:
                    machine = host.machines.get(file.read())
                if machine.state.phase != RUNNING:
                    raise LaunchError(f"the {type_} ended at once", command="sh")
                yield machine, seconds
        finally:
            if machine is not None and os.path.exists(machine.directory):
                try:
                    machine.remove(force=True, volumes=True)
                except NotFound:
                    pass  # --rm was quicker


# -- memory


def _machine_bytes(pid: int) -> float:
    """Proportional set sizes of all that a machine is on this host: its supervisor's process and all below it."""
    children: dict[int, list[int]] = {}
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rsplit(b")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            children.setdefault(parent, []).append(int(name))
            parents[int(name)] = parent
    waiting, total = [parents[pid]], 0.0
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        try:
            total += _proportional_bytes(one)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def _proportional_bytes(pid: int) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith("Pss:"):
                return float(line.split()[1]) * 1024
    return 0.0


@contextmanager
def _echo(address: str) -> Iterator[int]:
    """The port of a server at `address` that sends back what it gets, until the end of the block."""
    argv = (agent_path(), "--applet", "bench", "serve", address)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise HostError(process.stderr.read().decode(errors="replace").strip(), operation="bind")
        yield int(line)
    finally:
        process.kill()
        process.communicate()
