"""Hostile bytes into both ends of the agent protocol, and into the agent's tar reader.

The oracle: the agent (built with address and undefined-behaviour sanitizers) ends, or still answers, and reports
nothing; the host's link raises `RemoteError` or nothing. NAGAYA_FUZZ_SECONDS makes each test longer (3 s);
NAGAYA_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import io
import os
import random
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from socket import SHUT_WR

import pytest

from nagaya.errors import RemoteError
from nagaya.kernel import mount
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Process
from nagaya.protocol import agent as protocol
from nagaya.protocol.agent import AgentLink, spawn_payload
from nagaya.protocol.frame import Decoder, encode
from tests.kernel.agent_machine import LAX, Machine, build_agent

SECONDS = float(os.environ.get("NAGAYA_FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("NAGAYA_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
REPORTS = (b"Sanitizer", b"runtime error")
PROBE = 0x7FFFFFFF
CRASHES = (signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)
BLOCK = 512


@pytest.fixture(scope="module")
def agent() -> str:
    """The checked agent; its reports go to standard error and end it."""
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1:exitcode=77"
    os.environ["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return build_agent(checked=True)


@pytest.fixture
def dice() -> random.Random:
    return random.Random(SEED)


def mutate(dice: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut, doubled or put in."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(out) + 1)
        match dice.randrange(5):
            case 0 if out:
                out[at % len(out)] = dice.randrange(256)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = dice.randbytes(dice.randrange(1, 9))
            case 3 if out:
                out[at % len(out)] ^= 1 << dice.randrange(8)
            case _:
                out[at : at + 4] = struct.pack("<I", dice.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 65536)))
    return bytes(out)


# -- into the agent


def confine(place: str, log: str) -> Callable[[], None]:
    """A root of its own for a machine: mutated SPAWNs make directories, and run what they find, as root."""

    def enter() -> None:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND)
        mount.mount("none", place, "tmpfs", 0)
        for name in ("usr", "proc", "dev", "tmp"):
            os.mkdir(f"{place}/{name}")
        for name in ("bin", "lib", "lib64", "sbin"):
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), f"{place}/{name}")
        mount.mount("/usr", f"{place}/usr", "", mount.MS_BIND)
        mount.mount("", f"{place}/usr", "", mount.MS_BIND | mount.MS_REMOUNT | mount.MS_RDONLY)
        mount.mount("none", f"{place}/dev", "devpts", 0)
        os.chroot(place)
        os.chdir("/")
        os.dup2(fd, 2)

    return enter


ARGVS = (("true",), ("cat",), ("sh", "-c", "echo out; echo err >&2"), ("sleep", "9"), ("nosuch",), ("seq", "30000"))
APPLETS = (("stat", "/"), ("ps",), ("tar-out", "/tmp"), ("tar-in", "/tmp"), ("nosuch",))


def a_spawn(dice: random.Random) -> bytes:
    applet = dice.random() < 0.3
    process = Process(
        argv=dice.choice(APPLETS if applet else ARGVS), env=("PATH=/bin",), workdir=dice.choice(("/", "/tmp", "/tmp/a/b")),
        user=dice.choice(("", "", "1:2", "bob")), tty=dice.random() < 0.2, stdin=dice.random() < 0.6, rows=9, columns=9,
    )  # fmt: skip
    policy = LAX if dice.random() < 0.5 else ProcessPolicy(0x3FF, True, bytes(8) * dice.randrange(3), ((7, 64, 64),))
    payload = spawn_payload(process, policy, applet=applet, discard=dice.random() < 0.2)
    return mutate(dice, payload) if dice.random() < 0.1 else payload


def a_frame(dice: random.Random, channels: list[int]) -> bytes:
    """Mostly what a host might say, on channels that may have ended; now and then nonsense."""
    channel = dice.choice(channels) if channels and dice.random() < 0.9 else dice.randrange(4)
    match dice.randrange(11):
        case 0 | 1:
            channels.append(len(channels) + 10)
            frame = encode(protocol.SPAWN, channels[-1], a_spawn(dice))
        case 2 | 3:
            frame = encode(protocol.STDIN, channel, dice.randbytes(dice.choice((0, 1, 512, 5000, 40_000))))
        case 4:
            frame = encode(protocol.STDIN_CLOSE, channel)
        case 5:
            frame = encode(protocol.CREDIT, channel, struct.pack("<I", dice.choice((0, 0, 0, 1, 1 << 18))))
        case 6:
            frame = encode(protocol.SIGNAL, channel, struct.pack("<I", dice.choice((0, 1, 9, 15, 19, 18, 65, 1 << 31))))
        case 7:
            frame = encode(protocol.RESIZE, channel, dice.randbytes(4))
        case 8:
            frame = encode(protocol.HOLD, 0, b"" if dice.random() < 0.9 else b"x")
        case 9:
            frame = encode(protocol.CONTINUE, 0, dice.randbytes(dice.choice((0, 0, 8, 16))))
        case _:
            frame = encode(dice.randrange(24), channel, dice.randbytes(dice.randrange(12)))
            if dice.random() < 0.7:
                frame = encode(protocol.RESIZE, channel, bytes(4))
    return frame


def ends_or_answers(machine: Machine, frames: bytes, *, whole: bool) -> str:
    """Send all, then ask: "ended" or "answers"; anything else raises. Reads all the while, as a supervisor does.

    When the frames are not `whole`, one may have swallowed the question: then the agent must end with its stream.
    """
    decoder, seen = Decoder(), bytearray()
    rest = memoryview(
        frames + encode(protocol.SPAWN, PROBE, spawn_payload(Process(argv=("stat", "/")), LAX, applet=True))
    )
    deadline = time.monotonic() + 15
    poll = select.poll()
    socket = machine._socket
    while time.monotonic() < deadline:
        poll.register(socket, select.POLLIN | (select.POLLOUT if rest else 0))
        if not poll.poll(1000) and not rest and not whole:
            socket.shutdown(SHUT_WR)
        try:
            if rest:
                rest = rest[socket.send(rest) :]
        except BlockingIOError:
            pass  # it is busy answering
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
            if frame.channel == PROBE and frame.type in (protocol.STARTED, protocol.SPAWN_FAILED):
                return "answers"
    raise AssertionError("the agent neither ends nor answers")


def asks_for_a_crash(stream: bytes) -> bool:
    """Whether it sends a program a signal that the sanitizers take for a crash of the agent's own."""
    head = re.escape(encode(protocol.SIGNAL, 0, bytes(4))[:8])  # then the channel, in four bytes
    numbers = b"|".join(re.escape(struct.pack("<I", number)) for number in CRASHES)
    return re.search(head + b".{4}(" + numbers + b")", stream, re.DOTALL) is not None


def test_frames_into_the_agent(agent: str, dice: random.Random, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    place = tmp_path / "root"
    place.mkdir()
    outcomes = {"ended": 0, "answers": 0}
    ends = time.monotonic() + SECONDS
    try:
        while time.monotonic() < ends:
            with Machine(agent, enter=confine(str(place), str(log))) as machine:
                channels: list[int] = []
                frames = [a_frame(dice, channels) for _ in range(dice.randrange(1, 40))]
                if not (whole := dice.random() < 0.7):
                    at = dice.randrange(len(frames))
                    frames[at] = mutate(dice, frames[at][:40]) + frames[at][40:]
                outcome = ends_or_answers(machine, b"".join(frames), whole=whole)
                status = os.waitstatus_to_exitcode(machine.close())
            outcomes[outcome] += 1
            assert status in (0, 100), f"the agent ended with {status}"
            report = log.read_bytes()
            if asks_for_a_crash(b"".join(frames)):  # and gets it, in a child that has not executed its program yet
                log.write_bytes(b"")
                continue
            assert not any(word in report for word in REPORTS), report.decode(errors="replace")
    except BaseException:
        print(f"NAGAYA_FUZZ_SEED={SEED}; {outcomes}\n{log.read_text(errors='replace')}")
        raise
    assert min(outcomes.values()) > 0, f"a fuzzer that sees one outcome only tests little: {outcomes}"


# -- into the tar reader


def an_archive(dice: random.Random) -> bytes:
    out = io.BytesIO()
    format = dice.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    types = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    names = ["a", "a/b", "a/b/c", "d", "é", "../x", "/abs", "."]
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for _ in range(dice.randrange(1, 8)):
            info = tarfile.TarInfo(
                dice.choice(names if format == tarfile.USTAR_FORMAT else [*names, "n" * 200, "p/" * 90 + "q"])
            )
            info.type, info.linkname, info.mtime = dice.choice(types), dice.choice(names), dice.choice((0, 1, 1.5))
            if format == tarfile.PAX_FORMAT and dice.random() < 0.3:
                info.pax_headers = {dice.choice(("SCHILY.xattr.user.x", "path", "uid", "comment", "size")): "7"}
            data = dice.randbytes(dice.choice((0, 1, 600))) if info.type == tarfile.REGTYPE else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def a_sparse_archive(dice: random.Random) -> bytes:
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n19 GNU.sparse.name=s\n31 GNU.sparse.realsize=1000000\n"
    head, info = tarfile.TarInfo("x"), tarfile.TarInfo("s")
    head.type, head.size = tarfile.XHDTYPE, len(records)
    body = b"2\n0\n600\n%d\n100\n" % dice.choice((1000, 999_900, 999_901))
    body += bytes(BLOCK - len(body)) + bytes(700)
    info.size = len(body)
    padded = [records + bytes(-len(records) % BLOCK), body + bytes(-len(body) % BLOCK)]
    return (
        head.tobuf(tarfile.USTAR_FORMAT) + padded[0] + info.tobuf(tarfile.USTAR_FORMAT) + padded[1] + bytes(2 * BLOCK)
    )


def mend_checksums(data: bytearray) -> None:
    """So that a change is not all caught at the door."""
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def test_archives_into_the_agent(agent: str, dice: random.Random, tmp_path: Path) -> None:
    outside = tmp_path / "x"
    outside.write_text("outside")
    seen = set()
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        place = tmp_path / "in"
        place.mkdir()
        data = bytearray(a_sparse_archive(dice) if dice.random() < 0.2 else an_archive(dice))
        for _ in range(dice.randrange(4)):
            at = dice.randrange(len(data) // BLOCK) * BLOCK + dice.choice(
                (0, 100, 108, 124, 135, 156, 157, 345, dice.randrange(BLOCK))
            )
            data[at : at + 1] = dice.choice((b"\0", b"\x80", b"\xff", b"7", b"/", b".", b"\n", dice.randbytes(1)))
        if dice.random() < 0.9:
            mend_checksums(data)
        if dice.random() < 0.2:
            data = data[: dice.randrange(len(data))]
        done = subprocess.run([agent, "--applet", "tar-in", str(place)], input=data, capture_output=True, timeout=30)
        complaint = done.stderr.decode(errors="replace")
        (tmp_path / "last.tar").write_bytes(data)
        assert done.returncode in (0, 1), f"NAGAYA_FUZZ_SEED={SEED}: status {done.returncode}\n{complaint}"
        assert not any(word in done.stderr for word in REPORTS), f"NAGAYA_FUZZ_SEED={SEED}\n{complaint}"
        assert sorted(os.listdir(tmp_path)) == ["in", "last.tar", "x"], "it wrote outside its directory"
        assert outside.read_text() == "outside"
        seen.add(done.returncode)
        for directory, names, _ in os.walk(place):
            os.chmod(directory, 0o700)
            for name in names:
                if not stat.S_ISLNK(os.lstat(f"{directory}/{name}").st_mode):
                    os.chmod(f"{directory}/{name}", 0o700)
        shutil.rmtree(os.fsencode(place))
    assert seen == {0, 1}


# -- into the host's link


def a_session(dice: random.Random, *, vm: bool) -> list[bytes]:
    u32 = struct.Struct("<I")
    frames = [encode(protocol.HELLO, 0, struct.pack("<II", 1, int(vm)))]
    if vm:
        warnings = ("a warning", "änother one")[: dice.randrange(3)]
        text = "".join(f"{warning}\n" for warning in warnings).encode()
        answer = encode(protocol.READY, 0, u32.pack(len(warnings)) + text)
        frames.append(answer if dice.random() < 0.8 else encode(protocol.SETUP_FAILED, 0, u32.pack(19) + b"no disk"))
        if dice.random() < 0.3:
            frames.append(encode(protocol.OUT_OF_MEMORY, 0))
    for channel in (1, 2, 3):
        frames.append(encode(protocol.STARTED, channel, u32.pack(channel + 5)))
        sizes = [dice.choice((1, 900, 65536)) for _ in range(dice.randrange(4))]
        frames += [encode(dice.choice((protocol.STDOUT, protocol.STDERR)), channel, dice.randbytes(n)) for n in sizes]
        frames.append(encode(protocol.CREDIT, channel, u32.pack(dice.randrange(200))))
        frames.append(encode(protocol.EXITED, channel, u32.pack(dice.randrange(256))))
    return frames


def test_bytes_into_the_link(dice: random.Random) -> None:
    refused = passed = 0
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        link = AgentLink()
        if vm := dice.random() < 0.5:
            link.setup(dice.randbytes(99))
        for _ in range(3):
            link.send_stdin(link.spawn(Process(argv=("a",), stdin=True), LAX), bytes(200))
        frames = a_session(dice, vm=vm)
        if dice.random() < 0.7:
            at = dice.randrange(len(frames))
            frames[at] = mutate(dice, frames[at][:64]) + frames[at][64:]
        if dice.random() < 0.2:
            dice.shuffle(frames)
        stream = b"".join(frames)
        try:
            while stream:
                size = dice.choice((1, 7, 4096, 1 << 20))
                for event in link.receive(stream[:size]):
                    if isinstance(event, protocol.Output):
                        link.grant(event.channel, len(event.data))
                stream = stream[size:]
            passed += 1
        except RemoteError:
            refused += 1
        assert link._decoder.pending <= protocol.MAX_DATA + 12 or refused, "it keeps more than a frame"
    assert passed
    assert refused
