"""Hostile set-ups into the agent of a virtual machine: SETUP's parser, and what it makes of disks, mounts, files and links.

The oracle: the agent, built with sanitizers and the first program of its namespaces, is ready, or says what it cannot do, or
ends the machine as an orderly machine ends; it reports nothing and never hangs. NAGAYA_FUZZ_SECONDS and NAGAYA_FUZZ_SEED as in
test_agent_fuzz.py.
"""

from __future__ import annotations

import os
import random
import re
import select
import signal
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.engines.container.userns import open_userns
from nagaya.errors import HostError, RemoteError, UsageError
from nagaya.model.spec import Process
from nagaya.protocol import agent as protocol
from nagaya.protocol.agent import AgentLink, SetUp, SetupFailed, spawn_payload
from nagaya.protocol.frame import Decoder, encode
from nagaya.protocol.setup import GuestMount, GuestNetwork, GuestSetup, setup_payload
from tests.conftest import require_program
from tests.fuzz.test_agent_fuzz import PROBE, REPORTS, SECONDS, SEED, a_frame, asks_for_a_crash, mutate
from tests.kernel.agent_machine import LAX, Lost
from tests.kernel.vm_agent import MAC, VmMachine, build_vm_agent

FIELD = struct.Struct("<HHI")
RESTED = (128 + signal.SIGHUP, 128 + signal.SIGINT)  # what reboot(2) does in a PID namespace: a restart, a power-off
ANSWER_S = 30.0

NAMES = ("etc", "tmp", "dev", "proc", "sys", "to-proc", "a", "loop", "up", "many", "long", "var", "run", "x" * 255, "..", ".", "",
         "cpuinfo", "resolv.conf", "locked", "bin", "sh", "é", "y" * 256, "\udcff")  # fmt: skip
SYSCTLS = ("net.ipv4.ip_forward", "net.ipv4.conf.card0/5.forwarding", "kernel.hostname", "kernel.nothing", "..", "", "net/ipv4",
           "a." * 170, "vm.swappiness")  # fmt: skip
SOURCES = (
    "share",
    "share/",
    "share/directory",
    "share/single",
    "share/link",
    "share/fifo",
    "share/../x",
    "nosuch",
    "t" * 99,
    "",
)
TEXTS = ("", "1", "0", "n\nm", "v" * 5000)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_program("busybox")
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1:exitcode=77"
    os.environ["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return build_vm_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def userns(agent: str) -> Iterator[int]:
    try:
        fd, _ = open_userns(f"{os.getpid():08x}")
    except HostError as error:
        pytest.skip(f"needs user namespaces: {error.message}")
    yield fd
    os.close(fd)


@pytest.fixture
def dice() -> random.Random:
    return random.Random(SEED)


# -- what a host might say, and then some


def a_path(dice: random.Random) -> str:
    match dice.randrange(12):
        case 0:
            return "/" + "d/" * dice.choice((1, 40, 500, 2040, 2100, 9000))
        case 1:
            return dice.choice(("/etc/hosts", "/etc/resolv.conf", "/dev/x", "/dev/net/tun"))
        case _:
            return "/" + "/".join(dice.choice(NAMES) for _ in range(dice.choice((1, 1, 2, 3, 3, 9))))


def a_mount(dice: random.Random) -> GuestMount:
    return GuestMount(
        dice.choice(("tmpfs", "virtiofs")), dice.choice(SOURCES[:4] if dice.random() < 0.7 else SOURCES), a_path(dice),
        read_only=dice.random() < 0.3, options=tuple(o for o in ("nosuid", "nodev", "noexec") if dice.random() < 0.3),
        size_bytes=dice.choice((0, 0, 1 << 16, 1, (1 << 64) - 1)), mode=dice.choice((0o1777, 0, 0o700, 0xFFFFFFFF)),
    )  # fmt: skip


def some(dice: random.Random, most: int = 3) -> range:
    return range(dice.choice((0, 0, 1, 1, 2, most)))


def a_setup(dice: random.Random) -> GuestSetup:
    network = GuestNetwork(
        MAC if dice.random() < 0.9 else "02:00:00:00:00:01", "192.0.2.7", dice.randrange(33),
        dice.choice(("", "192.0.2.1", "198.51.100.1", "255.255.255.255")), dice.choice((0, 0, 1400, 68, 1, 0xFFFFFFFF)), name=dice.choice(("eth0", "eth0", "lo", "card0", "n" * 15)),
        address6=dice.choice(("", "2001:db8::7", "fe80::1")), prefix6=dice.choice((0, 64, 128)), gateway6=dice.choice(("", "2001:db8::1")),
    )  # fmt: skip
    pinned = dice.random() < 0.6  # most machines come to be, or nothing is tested behind READY
    return GuestSetup(
        hostname=dice.choice(("m", "", "h" * 64, "a b", "é")),
        read_only=dice.random() < 0.2,
        time_ns=dice.choice((0, 1_900_000_000 * 10**9, 1, (1 << 64) - 1)),
        entropy=dice.randbytes(dice.choice((0, 1, 64, 512))),
        files=tuple((("/etc/hosts" if pinned else a_path(dice)), dice.randbytes(dice.choice((0, 9, 70_000)))) for _ in some(dice, 9)),
        mounts=tuple(GuestMount("tmpfs", "", f"/tmp/{n}") if pinned else a_mount(dice) for n in some(dice, 70)),
        networks=(network,) * dice.choice((0, 0, 1, 1, 2)),
        sysctls=tuple(
            ("net.ipv4.ip_forward", "1") if pinned else (dice.choice(SYSCTLS), dice.choice(TEXTS)) for _ in some(dice)
        ),
        unmask=dice.random() < 0.3,
        power_off=dice.choice(("acpi", "reboot", "port")),
        devices=tuple(
            (dice.choice(("/dev/null", "zero", "/dev/nosuch", "../dev/null", "")), "/dev/mine" if pinned else a_path(dice))
            for _ in some(dice)
        ) if dice.random() < 0.5 else (),
        data_only=dice.random() < 0.1,
        own_pids=dice.random() < 0.2,
        pids=dice.choice((0, 0, 1, 40, 0xFFFFFFFF)),
    )  # fmt: skip


def split(payload: bytes) -> list[bytes]:
    """A payload's fields, with their heads."""
    fields, at = [], 0
    while at < len(payload):
        size = FIELD.size + FIELD.unpack_from(payload, at)[2]
        fields.append(payload[at : at + size])
        at += size
    return fields


def a_payload(dice: random.Random) -> bytes:
    """A set-up as a host would send it; some with fields of other orders, counts and lengths, or spoilt bytes."""
    while True:
        try:
            payload = setup_payload(a_setup(dice))
            break
        except UsageError:
            continue
    if dice.random() < 0.6:
        return payload
    fields = split(payload)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(len(fields))
        tag, _, size = FIELD.unpack_from(fields[at].ljust(FIELD.size, b"\0"))  # it may have been cut already
        match dice.randrange(7):
            case 0:
                dice.shuffle(fields)
            case 1:
                fields.insert(at, fields[at])
            case 2 if len(fields) > 1:
                del fields[at]
            case 3:
                fields[at] = FIELD.pack(dice.randrange(14), 0, size) + fields[at][FIELD.size :]
            case 4:
                body = dice.randbytes(dice.choice((0, 1, 4, 8, 19, 20, 24, 25, 64, 65, 512, 513)))
                fields[at] = FIELD.pack(tag, 0, len(body)) + body
            case 5:
                body = fields[at][FIELD.size :].replace(b"\0", dice.choice((b"", b"\0\0", b"/")))
                fields[at] = FIELD.pack(tag, 0, len(body)) + body
            case _:
                fields[at] = mutate(dice, fields[at])
    return b"".join(fields)[: protocol.MAX_PAYLOAD]


def a_talk(dice: random.Random) -> tuple[bytes, bool]:
    """SETUP and what comes after it; whether every frame is whole, so that the question after it is heard."""
    payload = a_payload(dice)
    frames = [encode(protocol.SETUP, 0 if dice.random() < 0.97 else 1, payload)]
    if dice.random() < 0.03:
        frames.insert(0, encode(protocol.CLOCK, 0, bytes(8)))
    channels: list[int] = []
    for _ in range(dice.choice((0, 0, 3, 12))):
        match dice.randrange(12):
            case 0:
                frames.append(encode(protocol.CLOCK, 0, dice.randbytes(dice.choice((8, 8, 8, 7, 0)))))
            case 1 | 2:
                channels.append(len(channels) + 10)
                applet = Process(
                    argv=dice.choice((("stat", "/upper"), ("tar-out", "/"), ("tar-in", "/tmp"))),
                    stdin=dice.random() < 0.5,
                )
                frames.append(
                    encode(protocol.SPAWN, channels[-1], spawn_payload(applet, LAX, applet=True, data_disk=True))
                )
            case 3 | 4:
                channels.append(len(channels) + 10)
                main = Process(
                    argv=dice.choice((("/bin/sh", "-c", "echo $$"), ("/bin/cat",), ("nosuch",))),
                    stdin=dice.random() < 0.5,
                )
                frames.append(encode(protocol.SPAWN, channels[-1], spawn_payload(main, LAX, main=True)))
            case 5 if dice.random() < 0.2:
                frames.append(encode(protocol.SETUP, 0, payload))
            case 6 if dice.random() < 0.2:
                frames.append(encode(protocol.SHUTDOWN, 0))
            case _:
                frames.append(a_frame(dice, channels))
    if whole := dice.random() < 0.85:
        return b"".join(frames), whole
    at = dice.randrange(len(frames))
    frames[at] = mutate(dice, frames[at][:40]) + frames[at][40:]
    return b"".join(frames), whole


# -- what comes of it


def converse(machine: VmMachine, talk: bytes, *, whole: bool) -> str:
    """Send all, then ask for an applet: "ended", "failed: WHY", or "ready" when that answers. Anything else raises."""
    question = spawn_payload(Process(argv=("stat", "/")), LAX, applet=True)
    rest = memoryview(talk + encode(protocol.SPAWN, PROBE, question))
    decoder, seen, hung_up = Decoder(), bytearray(), False
    socket, poll = machine._socket, select.poll()
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        poll.register(socket, select.POLLIN | (select.POLLOUT if rest else 0))
        if not poll.poll(1000) and not rest and not whole and not hung_up:
            hung_up = True
            socket.shutdown(1)
        try:
            if rest:
                rest = rest[socket.send(rest) :]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            rest = memoryview(b"")
        try:
            data = socket.recv(1 << 16)
        except BlockingIOError:
            continue
        except ConnectionResetError:
            data = b""
        if not data:
            return "ended"
        for frame in decoder.feed(data):
            if frame.type in (protocol.STDOUT, protocol.STDERR):
                seen += frame.payload
                assert not any(report in seen for report in REPORTS), bytes(seen).decode(errors="replace")
            if frame.type in (protocol.READY, protocol.SETUP_FAILED):
                check_answer(encode(frame.type, frame.channel, frame.payload))
            if frame.type == protocol.SETUP_FAILED:
                return "failed: " + frame.payload[4:].decode(errors="replace")
            if frame.channel == PROBE and frame.type in (protocol.STARTED, protocol.SPAWN_FAILED):
                return "ready"
    raise AssertionError("the agent neither ends nor answers")


def check_answer(frame: bytes) -> None:
    """The host takes it for an answer: whatever a set-up says, the real agent's own words are no violation."""
    link = AgentLink()
    link.setup(b"")
    try:
        (event, *_) = link.receive(encode(protocol.HELLO, 0, struct.pack("<II", protocol.VERSION, 1)) + frame)[1:]
    except RemoteError as error:
        raise AssertionError(f"the host refuses the agent's answer: {error.message}: {frame[:200]!r}") from None
    assert isinstance(event, (SetUp, SetupFailed))


def kind_of(outcome: str) -> str:
    """A failure without what it quotes."""
    return re.sub(r"'.*?'|/\S*|[=:].*", "_", outcome.removeprefix("failed: "))[:60]


def test_set_ups_into_the_agent(agent: str, userns: int, dice: random.Random, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    outcomes: Counter[str] = Counter()
    ends = time.monotonic() + SECONDS
    talk = b""
    try:
        while time.monotonic() < ends:
            talk, whole = a_talk(dice)
            machine = VmMachine(agent, userns, str(log))
            try:
                machine.__enter__()
                outcome = converse(machine, talk, whole=whole)
            except Lost:
                outcome = "lost"
            finally:
                status = os.waitstatus_to_exitcode(machine.close())
            outcomes[kind_of(outcome)] += 1
            report = log.read_bytes()
            if asks_for_a_crash(talk):  # of a program of the machine's, before it has become one
                log.write_bytes(b"")
                report = b""
            assert not any(word in report for word in REPORTS), report.decode(errors="replace")
            assert status in RESTED, f"the machine ended with {status}, after '{outcome}'"
    except BaseException:
        (tmp_path / "talk").write_bytes(talk)
        print(f"{tmp_path}/talk; NAGAYA_FUZZ_SEED={SEED}; {outcomes}\n{log.read_text(errors='replace')}")
        raise
    print(f"{outcomes.total()} machines: {outcomes.most_common()}")
    # About one in eight does, by chance; of the few dozen that a short run makes, hardly ever less than one in fifty.
    assert outcomes["ready"] >= max(1, outcomes.total() / 50), f"few of its set-ups make a machine: {outcomes}"
    assert outcomes["ended"] and len(outcomes) > 3, f"a fuzzer that sees few outcomes tests little: {outcomes}"
