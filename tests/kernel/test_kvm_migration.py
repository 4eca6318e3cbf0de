"""Machines of a few bytes on their way from one VMM to another, on the real /dev/kvm, and streams that break at each step.

Both sides are in this process; between them is a relay that can cut the stream before any frame. Whatever happens, one of
the two machines runs in the end, and never both.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nagaya.engines.base import Incoming
from nagaya.engines.kvm import arriving, vm
from nagaya.engines.kvm.leaving import Leaving
from nagaya.engines.kvm.machine import Machine
from nagaya.errors import NagayaError, Unsupported
from nagaya.kernel.userfaultfd import open_userfaultfd
from nagaya.memory import PAGE_BYTES
from nagaya.migration import frames, report
from nagaya.migration.departure import Terms
from nagaya.virtio.blk import Blk
from nagaya.virtio.rng import Rng
from tests.kernel.test_kvm_machine import COUNTER_GPA, PATIENCE_S, TEXT_GPA, open_files
from tests.kernel.test_kvm_snapshot import LEAVES, count_of, hardware, memory_of, wait_for
from tests.kernel_images import Load, make_elf

DISK_BYTES = 1 << 20
MARK_GPA = 3000 * PAGE_BYTES


@pytest.fixture(autouse=True)
def kvm_and_nothing_left() -> Iterator[None]:
    try:
        os.close(vm.open_kvm())
    except Unsupported as error:
        pytest.skip(f"needs kvm: {error}")
    before = open_files()
    yield
    wait_for(lambda: open_files() == before)


class Supervisor(threading.Thread):
    """The other end of a process's report: answers as a supervisor would, and keeps what was said."""

    ANSWERS = {
        "freeze": {"what": "frozen"}, "standing": {"what": "carried", "programs": {"some": "programs"}},
        "ready": {"what": "recorded"}, "programs": {"what": "taken"}, "early": {"what": "taken"},
        "committed": {"what": "recorded"},
    }  # fmt: skip

    def __init__(self, answers: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__(daemon=True)
        self.answers = {**self.ANSWERS, **(answers or {})}
        self.said: list[dict[str, Any]] = []
        ours, theirs = socket.socketpair()
        self.ours = ours
        self.report_fd = theirs.detach()
        self.start()

    def run(self) -> None:
        lines = report.Lines()
        while True:
            try:
                data = self.ours.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            for message in lines.feed(data):
                self.said.append(message)
                if message["what"] in self.answers:
                    self.answer(self.answers[message["what"]])

    def answer(self, message: dict[str, Any]) -> None:
        self.ours.sendall(report.encode(message))

    def words(self) -> list[str]:
        return [message["what"] for message in self.said]

    def wait_for(self, *words: str) -> dict[str, Any]:
        wait_for(lambda: any(word in self.words() for word in words))
        return next(message for message in self.said if message["what"] in words)


class Relay(threading.Thread):
    """Hands frames on from one side to the other, up to the first that `stop` is true of: there the stream breaks."""

    def __init__(
        self, source: socket.socket, target: socket.socket, stop: Callable[[int], bool], *, round_s: float = 0,
        behind: int = -1,
    ) -> None:  # fmt: skip
        """`round_s`: how long each round takes at least. Behind a frame of the type `behind` the stream breaks too."""
        super().__init__(daemon=True)
        self.source, self.target, self.stop, self.round_s, self.behind = source, target, stop, round_s, behind
        self.seen: list[int] = []

    def run(self) -> None:
        try:
            while header := self.take(frames.HEADER.size):
                type_, length, _, _ = frames.parse_header(header)
                payload = self.take(length)
                if self.stop(type_):
                    break
                self.seen.append(type_)
                time.sleep(self.round_s if type_ == frames.ROUND else 0)
                self.target.sendall(header + payload)
                if type_ == self.behind:
                    break
        except OSError:
            pass  # the other direction was cut
        for end in (self.source, self.target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.source.recv(count - len(data))
            if not part:
                raise OSError
            data += part
        return data


class Move:
    """One migration between two machines of this process."""

    def __init__(
        self, kernel: str, place: Path, *, stop_out: int = -1, stop_back: int = -1, terms: Terms | None = None,
        answers: dict[str, dict[str, Any]] | None = None, round_s: float = 0, behind: int = -1,
    ) -> None:  # fmt: skip
        self.disks = place / "source", place / "target"
        self.disks[0].write_bytes(b"disk" * (DISK_BYTES // 8) + bytes(DISK_BYTES // 2))
        self.disks[1].touch()
        os.truncate(self.disks[1], DISK_BYTES)
        self.source = Machine(hardware(kernel), (Rng("rng0"), Blk("blk0", str(self.disks[0]))))
        self.source.start()
        wait_for(lambda: count_of(self.source) > 1000)
        memory_of(self.source).write(MARK_GPA, b"mark" * 1024)
        devices = (Rng("rng0"), Blk("blk0", str(self.disks[1])))
        self.target = Machine(hardware(kernel), devices, bare=self.source.describe())
        self.target.make()
        (here, relay_here), (relay_there, there) = socket.socketpair(), socket.socketpair()
        self.relays = (
            Relay(relay_here, relay_there, lambda type_: type_ == stop_out, round_s=round_s, behind=behind),
            Relay(relay_there, relay_here, lambda type_: type_ == stop_back),
        )
        self.here_supervisor, self.there_supervisor = Supervisor(answers), Supervisor(answers)
        self.there = there
        self.arrival = threading.Thread(target=self.arrive, daemon=True)
        self.arrival.start()
        for relay in self.relays:
            relay.start()
        data = b""
        while len(data) < frames.HEADER.size:  # ACCEPT is the command's to read
            data += here.recv(frames.HEADER.size - len(data))
        assert frames.parse_header(data)[0] == frames.ACCEPT
        here.recv(frames.parse_header(data)[1])
        fd = here.detach()
        self.leaving = Leaving(self.source, (fd, os.dup(fd)), self.here_supervisor.report_fd, terms or Terms(60_000))
        self.departure = threading.Thread(target=self.leaving.run, daemon=True)
        self.departure.start()

    def arrive(self) -> None:
        fd = self.there.fileno()
        incoming = Incoming(fd, fd, self.there_supervisor.report_fd, "{}")
        try:
            arriving.arrive(self.target, incoming, open_userfaultfd())
        except NagayaError:
            return  # as the supervisor has heard

    def close(self) -> None:
        for relay in self.relays:
            relay.stop = lambda type_: True
            for end in (relay.source, relay.target):
                end.close()
        self.here_supervisor.ours.shutdown(socket.SHUT_RDWR)
        self.departure.join(PATIENCE_S)
        if self.leaving._release is not None:  # else a process that is left so is killed
            self.leaving._release()
        self.source.close()
        self.here_supervisor.ours.close()
        self.arrival.join(PATIENCE_S)
        self.target.close()
        self.there.close()
        self.there_supervisor.ours.close()
        os.close(self.there_supervisor.report_fd)

    def __enter__(self) -> Move:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def runs(machine: Machine) -> bool:
    """Whether its counter moves."""
    if machine._parts is None:
        return False
    before = count_of(machine)
    time.sleep(0.05)
    return count_of(machine) > before


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel"
    path.write_bytes(make_elf([Load(LEAVES, TEXT_GPA)], entry=TEXT_GPA))
    return str(path)


def test_it_runs_there_and_no_longer_here(kernel: str, tmp_path: Path) -> None:
    with Move(kernel, tmp_path) as move:
        gone = move.here_supervisor.wait_for("gone", "stayed", "doubt")
        assert gone["what"] == "gone", gone
        assert move.there_supervisor.wait_for("running")
        assert not runs(move.source)
        assert count_of(move.target) >= count_of(move.source) > 1000
        wait_for(lambda: runs(move.target))
        assert memory_of(move.target).read(MARK_GPA, 4096) == b"mark" * 1024
        assert move.disks[0].read_bytes() == move.disks[1].read_bytes()
        assert os.stat(move.disks[1]).st_blocks * 512 <= DISK_BYTES * 3 // 4  # zeros stay holes
        assert move.there_supervisor.said[0] == {"what": "programs", "programs": {"some": "programs"}}


@pytest.mark.parametrize(
    ("out", "back"),
    [
        (frames.PAGES, -1), (frames.BLOCKS, -1), (frames.ROUND, -1), (frames.STATE, -1), (-1, frames.ROUND),
        (-1, frames.READY),
    ],
    ids=["pages", "blocks", "round", "state", "round-back", "ready"],
)  # fmt: skip
def test_a_stream_that_breaks_before_the_last_step_leaves_it_here(
    kernel: str, tmp_path: Path, out: int, back: int
) -> None:
    with Move(kernel, tmp_path, stop_out=out, stop_back=back) as move:
        assert move.here_supervisor.wait_for("gone", "stayed", "doubt")["what"] == "stayed"
        wait_for(lambda: runs(move.source))
        assert move.there_supervisor.wait_for("failed", "running")["what"] == "failed"
        assert not runs(move.target)


def test_a_stream_that_breaks_before_commit_is_heard_leaves_doubt_and_can_be_settled(
    kernel: str, tmp_path: Path
) -> None:
    with Move(kernel, tmp_path, stop_out=frames.COMMIT) as move:
        assert move.here_supervisor.wait_for("gone", "stayed", "doubt")["what"] == "doubt"
        assert move.there_supervisor.wait_for("failed", "running")["what"] == "failed"
        assert not runs(move.source) and not runs(move.target)
        move.here_supervisor.answer({"what": "abort"})  # too late for that
        assert not runs(move.source)
        move.here_supervisor.answer({"what": "stay"})
        move.here_supervisor.wait_for("stayed")
        wait_for(lambda: runs(move.source))


def test_a_stream_that_breaks_behind_commit_leaves_it_there(kernel: str, tmp_path: Path) -> None:
    with Move(kernel, tmp_path, stop_back=frames.RUNNING) as move:
        assert move.here_supervisor.wait_for("gone", "stayed", "doubt")["what"] == "doubt"
        wait_for(lambda: runs(move.target))
        assert not runs(move.source)


@pytest.mark.parametrize("post_copy", [False, True], ids=["", "post-copy"])
def test_a_target_that_has_heard_commit_goes_on_when_it_cannot_say_so(
    kernel: str, tmp_path: Path, post_copy: bool
) -> None:
    terms = EARLY if post_copy else None
    with Move(kernel, tmp_path, behind=frames.COMMIT, terms=terms, round_s=0.1 if post_copy else 0) as move:
        assert move.here_supervisor.wait_for("gone", "stayed", "doubt")["what"] == "doubt"
        assert move.there_supervisor.wait_for("failed", "running")["what"] == "running"
        wait_for(lambda: runs(move.target))
        assert not runs(move.source)


@pytest.mark.parametrize("word", ["freeze", "standing", "ready"])
def test_what_is_called_off_stays_here(kernel: str, tmp_path: Path, word: str) -> None:
    with Move(kernel, tmp_path, answers={word: {"what": "abort", "why": "changed my mind"}}) as move:
        stayed = move.here_supervisor.wait_for("gone", "stayed", "doubt")
        assert stayed["what"] == "stayed" and stayed["error"]["message"] == "changed my mind"
        wait_for(lambda: runs(move.source))
        failed = move.there_supervisor.wait_for("failed", "running")
        assert failed["what"] == "failed" and "changed my mind" in failed["error"]["message"]


@pytest.mark.parametrize("word", ["programs", "committed"])
def test_what_is_refused_there_does_not_run_there(kernel: str, tmp_path: Path, word: str) -> None:
    refusal = {"what": "error", "error": {"kind": "conflict", "message": "not here"}}
    with Move(kernel, tmp_path, answers={word: refusal}) as move:
        said = move.here_supervisor.wait_for("gone", "stayed", "doubt")
        assert said["what"] == ("stayed" if word == "programs" else "doubt")
        assert move.there_supervisor.wait_for("failed", "running")["what"] == "failed"
        assert not runs(move.target)
        if word == "programs":
            assert said["error"]["message"] == "not here"
            wait_for(lambda: runs(move.source))


def test_one_that_writes_faster_than_the_stream_is_told_so(kernel: str, tmp_path: Path) -> None:
    with Move(kernel, tmp_path, terms=Terms(max_downtime_ms=1), round_s=0.1) as move:
        stayed = move.here_supervisor.wait_for("gone", "stayed", "doubt")
        assert stayed["what"] == "stayed" and "does not converge" in stayed["error"]["message"]
        assert "--max-downtime" in stayed["error"]["hint"]
        wait_for(lambda: runs(move.source))


EARLY = Terms(max_downtime_ms=1, post_copy=True)


def test_it_runs_there_before_its_memory_is_there(kernel: str, tmp_path: Path) -> None:
    with Move(kernel, tmp_path, terms=EARLY, round_s=0.1) as move:
        gone = move.here_supervisor.wait_for("gone", "stayed", "doubt")
        assert gone["what"] == "gone" and gone["post_copy"] and gone["paused_ms"] > 0, gone
        assert move.there_supervisor.wait_for("running")
        assert move.there_supervisor.words() == ["programs", "early", "committed", "running"]
        assert frames.STRANGE in move.relays[0].seen
        assert not runs(move.source)
        assert count_of(move.target) >= count_of(move.source) > 1000
        wait_for(lambda: runs(move.target))
        assert memory_of(move.target).read(MARK_GPA, 4096) == b"mark" * 1024


def test_a_stream_that_breaks_before_its_memory_is_there_takes_it_back(kernel: str, tmp_path: Path) -> None:
    with Move(kernel, tmp_path, terms=EARLY, round_s=0.1, stop_back=frames.READY) as move:
        assert move.here_supervisor.wait_for("gone", "stayed", "doubt")["what"] == "stayed"
        assert move.there_supervisor.wait_for("failed", "running")["what"] == "failed"
        move.target.close()  # as its process would be
        wait_for(lambda: runs(move.source))


def test_the_logs_know_what_guest_and_host_write(kernel: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(DISK_BYTES))
    with Machine(hardware(kernel), (Blk("blk0", str(tmp_path / "disk")),)) as machine:
        machine.start()
        machine.log_writes(True)
        machine.take_written()
        wait_for(lambda: (COUNTER_GPA, PAGE_BYTES) in machine.take_written())
        memory_of(machine).write(MARK_GPA, b"x")
        assert (MARK_GPA, PAGE_BYTES) in machine.take_written()
        memory_of(machine).discard(MARK_GPA, PAGE_BYTES)
        assert (MARK_GPA, PAGE_BYTES) in machine.take_written()
        machine.pause()
        machine.take_written()
        assert machine.take_written() == []
        machine.log_writes(False)
        memory_of(machine).write(MARK_GPA, b"x")
        machine.log_writes(True)
        assert machine.take_written() == []


def test_a_state_that_makes_no_sense_is_refused(kernel: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(DISK_BYTES))
    with Machine(hardware(kernel), (Blk("blk0", str(tmp_path / "disk")),)) as source:
        source.start()
        source.pause()
        release = source.hold_devices()
        state, described = source.save_standing(), source.describe()
        release()
    broken: list[dict[str, Any]] = [
        {**state, "vcpus": [{}]}, {**state, "vcpus": [{**state["vcpus"][0], "regs": "zz"}]},
        {**state, "vcpus": [{**state["vcpus"][0], "sregs": "00"}]}, {**state, "devices": [1]},
        {**state, "devices": [{**state["devices"][0], "registers": []}]}, {**state, "vm": {}}, {**state, "leaves": [[]]},
        {**state, "hardware": {}}, {**state, "kvm": "other"},
    ]  # fmt: skip
    for each in broken:
        with Machine(hardware(kernel), (Blk("blk0", str(tmp_path / "disk")),), bare=described) as target:
            target.make()
            with pytest.raises(NagayaError):
                target.adopt(each)
