"""The conversation loop in a process of its own, on real pipes and pseudo-terminals; this process plays supervisor."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nagaya.cli import terminal
from nagaya.cli.terminal import FORWARDED, DetachScanner, Signals
from nagaya.errors import NotFound
from nagaya.manager.attachment import Attachment, Connection
from nagaya.protocol import control
from nagaya.protocol.frame import Decoder, Frame, encode

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
DRIVER = """
import sys
from nagaya.cli import terminal
from nagaya.cli.failures import report
from nagaya.errors import NagayaError
from nagaya.manager.attachment import Attachment, Connection
fd, stdin, tty, proxy = int(sys.argv[1]), "i" in sys.argv[2], "t" in sys.argv[2], "p" in sys.argv[2]
try:
    with (
        terminal.watch_signals(stdin=stdin, tty=tty, sig_proxy=proxy) as signals,
        Attachment(Connection(fd)) as attachment,
    ):
        ending = terminal.converse(attachment, signals, stdin=stdin, tty=tty, sig_proxy=proxy)
    status = terminal.finish(ending)
    if ending.detached:
        print("detached", file=sys.stderr)
except NagayaError as error:
    report(error, debug=False)
    status = 125
sys.exit(status)
"""
PATIENCE_S = 10.0


class Supervisor:
    """The other end of the control connection."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process = process
        self.sock = sock
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        sock.settimeout(PATIENCE_S)

    def send(self, type_: int, payload: bytes = b"") -> None:
        self.sock.sendall(encode(type_, 0, payload))

    def output(self, data: bytes, *, stream: int = 1) -> None:
        self.send(control.STDOUT if stream == 1 else control.STDERR, data)

    def exit(self, status: int, why: str = "") -> None:
        self.sock.sendall(control.exited(status, why))

    def expect(self, type_: int) -> Frame:
        """The next frame, which must be of that type."""
        while not self._frames:
            data = self.sock.recv(1 << 20)
            assert data, "the client has closed the connection"
            self._frames += self._decoder.feed(data)
        frame = self._frames.pop(0)
        assert frame.type == type_, frame
        return frame

    def expect_signal(self) -> int:
        return control.parse_u32(self.expect(control.SIGNAL))

    def expect_closed(self) -> None:
        assert self.sock.recv(1 << 20) == b""

    def quiet(self, seconds: float = 0.05) -> bool:
        """Whether the client sends nothing for so long."""
        return not self._frames and not select.select([self.sock], [], [], seconds)[0]

    def status(self) -> int:
        return self.process.wait(PATIENCE_S)


@contextmanager
def conversation(mode: str, **streams: object) -> Iterator[Supervisor]:
    """`mode`: letters out of "i" (stdin), "t" (terminal), "p" (signals are passed on)."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(theirs.fileno()), mode],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": SOURCE},
        **streams,  # type: ignore[call-overload]
    )
    theirs.close()
    try:
        yield Supervisor(process, ours)
    finally:
        ours.close()
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def test_output_goes_to_its_stream_and_the_status_is_the_programs() -> None:
    with conversation("p", **PIPES) as supervisor:
        supervisor.output(b"out\n")
        supervisor.output(b"err\n", stream=2)
        supervisor.exit(7)
        assert supervisor.process.communicate(timeout=PATIENCE_S) == (b"out\n", b"err\n")
        assert supervisor.status() == 7


def test_why_the_machine_ended_is_told() -> None:
    with conversation("p", **PIPES) as supervisor:
        supervisor.exit(137, "the machine's init was killed from outside")
        _, err = supervisor.process.communicate(timeout=PATIENCE_S)
        assert err == b"nagaya: the machine's init was killed from outside\n"
        assert supervisor.status() == 137


def test_a_supervisor_that_dies_is_an_error_of_ours() -> None:
    with conversation("p", **PIPES) as supervisor:
        supervisor.output(b"last words\n")
        supervisor.sock.close()
        out, err = supervisor.process.communicate(timeout=PATIENCE_S)
        assert out == b"last words\n"
        assert err.startswith(b"nagaya: the machine's supervisor was killed")
        assert supervisor.status() == 125


def test_an_error_frame_is_raised() -> None:
    with conversation("p", **PIPES) as supervisor:
        supervisor.sock.sendall(control.error(NotFound("gone", hint="look elsewhere")))
        _, err = supervisor.process.communicate(timeout=PATIENCE_S)
        assert err == b"nagaya: gone\n  hint: look elsewhere\n"


def test_a_pipes_input_and_its_end_are_passed_on() -> None:
    with conversation("ip", **PIPES) as supervisor:
        assert supervisor.process.stdin is not None
        supervisor.process.stdin.write(b"hi\n")
        supervisor.process.stdin.close()
        assert supervisor.expect(control.STDIN).payload == b"hi\n"
        supervisor.expect(control.STDIN_CLOSE)
        supervisor.exit(0)
        assert supervisor.status() == 0


@pytest.mark.parametrize("content", [b"", b"from a file\n"])
def test_input_from_a_regular_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with open(tmp_path / "in", "rb") as file, conversation("ip", stdin=file) as supervisor:
        if content:
            assert supervisor.expect(control.STDIN).payload == content
        supervisor.expect(control.STDIN_CLOSE)
        supervisor.exit(0)
        assert supervisor.status() == 0


def test_input_from_dev_null_ends_at_once() -> None:
    with conversation("ip", stdin=subprocess.DEVNULL) as supervisor:
        supervisor.expect(control.STDIN_CLOSE)
        supervisor.exit(0)
        assert supervisor.status() == 0


def test_without_i_input_is_left_alone() -> None:
    with conversation("p", **PIPES) as supervisor:
        assert supervisor.process.stdin is not None
        supervisor.process.stdin.write(b"not for you\n")
        supervisor.process.stdin.flush()
        assert supervisor.quiet(0.2)
        supervisor.exit(0)
        assert supervisor.status() == 0


def test_no_more_input_is_read_than_the_program_takes(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * (control.WINDOW + 100_000))
    with open(tmp_path / "in", "rb") as file, conversation("ip", stdin=file) as supervisor:
        got = 0
        while got < control.WINDOW:
            got += len(supervisor.expect(control.STDIN).payload)
        assert got == control.WINDOW
        assert supervisor.quiet(0.2)
        before = _cpu_s(supervisor.process.pid)
        time.sleep(0.2)
        assert _cpu_s(supervisor.process.pid) - before < 0.1, "the client spins while it has no room"
        supervisor.send(control.CREDIT, control.U32.pack(100_001))  # one more: the end is read too
        while got < control.WINDOW + 100_000:
            got += len(supervisor.expect(control.STDIN).payload)
        supervisor.expect(control.STDIN_CLOSE)
        supervisor.exit(0)
        assert supervisor.status() == 0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_slow_reader_holds_output_back_and_loses_nothing() -> None:
    data = os.urandom(1 << 20)
    with conversation("p", **PIPES) as supervisor:
        supervisor.sock.setblocking(False)
        frames = b"".join(encode(control.STDOUT, 0, data[at : at + 65536]) for at in range(0, len(data), 65536))
        frames += control.exited(0)
        sent = 0
        while select.select([], [supervisor.sock], [], 0.2)[1]:
            sent += supervisor.sock.send(frames[sent : sent + 65536])
        assert sent < len(frames), "everything was taken although nobody reads"
        assert supervisor.process.stdout is not None
        out = b""
        while len(out) < len(data):  # of a part of a frame nothing comes out: whichever side goes on
            writable = [supervisor.sock] if sent < len(frames) else []
            out_ready, in_ready, _ = select.select([supervisor.process.stdout], writable, [], PATIENCE_S)
            assert out_ready or in_ready
            if in_ready:
                sent += supervisor.sock.send(frames[sent : sent + 65536])
            if out_ready:
                out += os.read(supervisor.process.stdout.fileno(), 65536)
        if sent < len(frames):
            supervisor.sock.setblocking(True)
            supervisor.sock.sendall(frames[sent:])
        assert out == data
        assert supervisor.status() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_signals_are_the_programs(number: int) -> None:
    with conversation("p", **PIPES) as supervisor:
        _wait_until_conversing(supervisor)
        supervisor.process.send_signal(number)
        assert supervisor.expect_signal() == number
        supervisor.exit(128 + number)
        assert supervisor.status() == 128 + number


def _wait_until_conversing(supervisor: Supervisor) -> None:
    supervisor.output(b".")
    assert supervisor.process.stdout is not None
    assert os.read(supervisor.process.stdout.fileno(), 1) == b"."


def test_a_signal_reaches_the_program_while_our_output_is_stuck() -> None:
    with conversation("p", **PIPES) as supervisor:
        _wait_until_conversing(supervisor)
        for _ in range(2):  # a pipe holds one of them
            supervisor.output(b"x" * 65536)
        time.sleep(0.1)
        supervisor.process.send_signal(signal.SIGTERM)
        assert supervisor.expect_signal() == signal.SIGTERM


def test_the_third_interrupt_leaves_a_program_that_ignores_them() -> None:
    with conversation("p", **PIPES) as supervisor:
        _wait_until_conversing(supervisor)
        for _ in range(3):
            supervisor.process.send_signal(signal.SIGINT)
            assert supervisor.expect_signal() == signal.SIGINT
        supervisor.expect_closed()
        _, err = supervisor.process.communicate(timeout=PATIENCE_S)
        assert b"detached" in err
        assert supervisor.status() == 130


def test_without_sig_proxy_a_signal_is_ours() -> None:
    with conversation("", **PIPES) as supervisor:
        _wait_until_conversing(supervisor)
        supervisor.process.send_signal(signal.SIGTERM)
        supervisor.expect_closed()
        assert supervisor.status() == -signal.SIGTERM


def test_a_reader_that_leaves_is_a_broken_pipe_for_the_program() -> None:
    with conversation("p", **PIPES) as supervisor:
        _wait_until_conversing(supervisor)
        assert supervisor.process.stdout is not None
        supervisor.process.stdout.close()
        supervisor.output(b"y\n" * 100)
        assert supervisor.expect_signal() == signal.SIGPIPE
        supervisor.output(b"standard error is still there\n", stream=2)
        supervisor.exit(141)
        assert supervisor.status() == 141
        assert supervisor.process.stderr is not None
        assert supervisor.process.stderr.read() == b"standard error is still there\n"


def test_a_program_that_writes_on_into_a_broken_pipe_is_left() -> None:
    with conversation("p", **PIPES) as supervisor:
        _wait_until_conversing(supervisor)
        assert supervisor.process.stdout is not None
        supervisor.process.stdout.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(10_000):
                supervisor.output(b"y" * 65536)
        assert supervisor.status() == 141


def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "wb") as full, conversation("p", stdout=full, stderr=subprocess.PIPE) as supervisor:
        supervisor.output(b"x")
        _, err = supervisor.process.communicate(timeout=PATIENCE_S)
        assert err.startswith(b"nagaya: cannot write standard output: No space left on device")
        assert supervisor.status() == 125


def test_a_second_interrupt_before_the_program_runs_is_an_interrupt() -> None:
    """Signals that come during a start wait for the program; but a start that hangs can be left."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Signals(FORWARDED) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.take() == [signal.SIGINT]
        assert signals.take() == []
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# -- with a terminal


class Terminal:
    """A pseudo-terminal whose slave is the client's standard streams."""

    def __init__(self, rows: int = 24, columns: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            assert select.select([self.master], [], [], PATIENCE_S)[0], data
            data += os.read(self.master, 65536)
        return data

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    @property
    def as_before(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def on_terminal(mode: str) -> Iterator[tuple[Supervisor, Terminal]]:
    terminal = Terminal()
    try:
        with conversation(
            mode, stdin=terminal.slave, stdout=terminal.slave, stderr=subprocess.PIPE, start_new_session=True
        ) as supervisor:
            assert control.parse_size(supervisor.expect(control.RESIZE)) == (24, 80)
            supervisor.output(b"$ ")
            assert terminal.read(2) == b"$ "
            yield supervisor, terminal
    finally:
        terminal.close()


def test_keys_reach_the_program_raw_and_the_terminal_is_put_back() -> None:
    with on_terminal("itp") as (supervisor, terminal):
        assert terminal.raw
        terminal.type(b"ls\r\x03")
        assert supervisor.expect(control.STDIN).payload == b"ls\r\x03"
        supervisor.output(b"a\nb")  # no output processing either: the program's terminal has done that
        assert terminal.read(3) == b"a\nb"
        supervisor.exit(3)
        assert supervisor.status() == 3
        assert terminal.as_before


def test_a_new_size_is_passed_on() -> None:
    with on_terminal("itp") as (supervisor, terminal):
        terminal.resize(50, 132)
        supervisor.process.send_signal(signal.SIGWINCH)  # the slave is no controlling terminal here
        assert control.parse_size(supervisor.expect(control.RESIZE)) == (50, 132)
        supervisor.exit(0)
        assert supervisor.status() == 0


def test_detach_keys_leave_the_program_running() -> None:
    with on_terminal("itp") as (supervisor, terminal):
        terminal.type(b"a\x10")
        assert supervisor.expect(control.STDIN).payload == b"a"
        assert supervisor.quiet()
        terminal.type(b"\x11")
        supervisor.expect_closed()
        assert supervisor.status() == 0
        assert terminal.as_before
        assert supervisor.process.stderr is not None
        assert supervisor.process.stderr.read() == b"\ndetached\n"


def test_what_waits_when_we_leave_still_arrives() -> None:
    """The supervisor is at work on something, and its socket is full."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    typed = os.urandom(30_000)
    with Attachment(Connection(ours.detach())) as attachment:
        attachment.send_stdin(typed)
        assert attachment.wants_write()
        left = terminal._Conversation(
            attachment, terminal.Signals(()), stdin=False, tty=False, detach_keys=b"", sig_proxy=False
        )
        left._leaving = terminal.Ending(0, detached=True)
        leaving = threading.Thread(target=left.run, args=(None,))
        leaving.start()
        time.sleep(0.2)
        theirs.settimeout(PATIENCE_S)
        got = bytearray()
        while len(got) < len(encode(control.STDIN, 0, typed)):
            got += theirs.recv(65536)
        leaving.join()
    theirs.close()
    assert Decoder().feed(bytes(got))[0].payload == typed


def test_a_begun_sequence_is_given_back() -> None:
    with on_terminal("itp") as (supervisor, terminal):
        terminal.type(b"\x10")
        assert supervisor.quiet()
        terminal.type(b"x")
        assert supervisor.expect(control.STDIN).payload == b"\x10x"
        supervisor.exit(0)
        assert supervisor.status() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_a_signal_ends_the_client_and_puts_the_terminal_back(number: int) -> None:
    with on_terminal("itp") as (supervisor, terminal):
        supervisor.process.send_signal(number)
        if number == signal.SIGHUP:  # a terminal that hangs up takes its program along
            assert supervisor.expect_signal() == signal.SIGHUP
        supervisor.expect_closed()
        assert supervisor.status() == 128 + number
        assert terminal.as_before


def test_the_terminal_is_put_back_when_the_supervisor_dies() -> None:
    with on_terminal("itp") as (supervisor, terminal):
        assert terminal.raw
        supervisor.sock.shutdown(socket.SHUT_RDWR)
        assert supervisor.status() == 125
        assert terminal.as_before


def test_raw_mode_comes_back_after_a_stop() -> None:
    with on_terminal("itp") as (supervisor, terminal):
        supervisor.process.send_signal(signal.SIGSTOP)
        termios.tcsetattr(terminal.slave, termios.TCSANOW, terminal.before)  # as a shell does
        supervisor.process.send_signal(signal.SIGCONT)
        supervisor.expect(control.RESIZE)
        assert terminal.raw
        supervisor.exit(0)
        assert supervisor.status() == 0


def test_a_terminal_without_i_stays_as_it_is() -> None:
    with on_terminal("tp") as (supervisor, terminal):
        assert terminal.as_before
        supervisor.process.send_signal(signal.SIGINT)
        assert supervisor.expect_signal() == signal.SIGINT
        supervisor.exit(130)
        assert supervisor.status() == 130


@pytest.mark.parametrize(
    ("keys", "chunks", "passed", "found"),
    [
        (b"\x10\x11", [b"abc"], b"abc", False),
        (b"\x10\x11", [b"a\x10\x11b"], b"a", True),
        (b"\x10\x11", [b"\x10", b"\x11"], b"", True),
        (b"\x10\x11", [b"\x10\x10\x11"], b"\x10", True),
        (b"\x10\x11", [b"\x10", b"x\x10", b"y"], b"\x10x\x10y", False),
        (b"aab", [b"aaab"], b"a", True),
        (b"aab", [b"aa", b"c"], b"aac", False),
        (b"abab", [b"ababab"], b"", True),
        (b"abac", [b"ababac"], b"ab", True),
        (b"q", [b"xq"], b"x", True),
        (b"", [b"\x10\x11"], b"\x10\x11", False),
    ],
)
def test_detach_scanner(keys: bytes, chunks: list[bytes], passed: bytes, found: bool) -> None:
    scanner = DetachScanner(keys)
    out, complete = b"", False
    for chunk in chunks:
        piece, complete = scanner.feed(chunk)
        out += piece
        if complete:
            break
    assert (out, complete) == (passed, found)
