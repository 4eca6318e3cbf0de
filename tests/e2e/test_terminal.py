"""In a real terminal (tmux): a shell inside, its size, Ctrl-C, leaving and coming back, and the status in the end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.conftest import require_program
from tests.e2e.command import Cli


class Tmux:
    """One window of a tmux server of our own."""

    def __init__(self, socket: str, cli: Cli) -> None:
        self._base = ["tmux", "-S", socket, "-f", "/dev/null"]
        environment = {**cli.env, "TERM": "xterm", "LC_ALL": "C.UTF-8", "ENV": ""}
        environment.pop("TMUX", None)
        subprocess.run(
            [*self._base, "new-session", "-d", "-x", "100", "-y", "30", "sh"], env=environment, check=True, timeout=20
        )

    def begin(self) -> None:
        """A prompt that can be told from what is typed."""
        self.type("PS1='ho''st> '; clear")
        self.wait_for("host>")

    def _tmux(self, *argv: str) -> str:
        return subprocess.run([*self._base, *argv], capture_output=True, text=True, check=True, timeout=20).stdout

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)
        self._tmux("send-keys", "Enter")

    def keys(self, *names: str) -> None:
        self._tmux("send-keys", *names)

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-S", "-200")

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def wait_for(self, text: str, times: int = 1, timeout_s: float = 15) -> str:
        deadline = time.monotonic() + timeout_s
        while True:
            screen = self.screen()
            if screen.count(text) >= times:
                return screen
            assert time.monotonic() < deadline, f"no {text!r} on:\n{screen}"
            time.sleep(0.05)

    def close(self) -> None:
        subprocess.run([*self._base, "kill-server"], capture_output=True, check=False, timeout=20)


@pytest.fixture
def terminal(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tmux]:
    require_program("tmux")
    socket = f"/tmp/nagaya-tmux-{os.getpid()}"
    made = Tmux(socket, cli)
    try:
        made.begin()
        yield made
    finally:
        made.close()
        if os.path.exists(socket):
            os.unlink(socket)


def _run(cli: Cli, *flags: str, program: str = "sh") -> str:
    return f"{cli.argv()[0]} run -it --network none -e PS1='in> ' {' '.join(flags)} busybox {program}"


def test_a_shell(cli: Cli, terminal: Tmux) -> None:
    terminal.type(_run(cli, "--rm"))
    terminal.wait_for("\nin>")
    terminal.type("stty size; tty; echo $TERM")
    screen = terminal.wait_for("\nxterm")
    assert "30 100" in screen
    assert "/dev/pts/" in screen
    terminal.resize(132, 43)
    terminal.type("sleep 0.3; stty size")
    terminal.wait_for("43 132")
    terminal.type("sleep 1000; echo after $?")
    time.sleep(0.5)
    terminal.keys("C-c")
    terminal.type("echo still $((40 + 2))")
    terminal.wait_for("still 42")
    terminal.type("exit 7")
    terminal.wait_for("host>", 2)
    terminal.type("echo status $?; stty -a | grep -o ' icanon'")
    terminal.wait_for("status 7")
    terminal.wait_for(" icanon")
    assert cli.machines() == []


def test_ctrl_c_ends_what_runs_alone(cli: Cli, terminal: Tmux) -> None:
    """Without -t the terminal stays cooked: Ctrl-C is a signal to the command, and is passed on."""
    # What is typed is on the screen too, and may be broken before any word: only the program says "ready" in one piece.
    script = "\"trap 'exit 5' INT; echo rea''dy; while :; do sleep 0.05; done\""
    terminal.type(f"{cli.argv()[0]} run --rm --network none busybox sh -c {script}; echo status $?")
    terminal.wait_for("\nready")
    terminal.keys("C-c")
    terminal.wait_for("status 5")
    assert cli.machines() == []


def test_leave_and_come_back(cli: Cli, terminal: Tmux) -> None:
    terminal.type(_run(cli, "--name", "m"))
    terminal.wait_for("\nin>")
    terminal.type("kept=here")
    terminal.keys("C-p")
    terminal.keys("C-q")
    terminal.wait_for("host>", 2)
    (machine,) = cli.machines()
    assert machine["state"] == "running"
    terminal.type(f"{cli.argv()[0]} attach m")
    time.sleep(0.3)
    terminal.type("echo kept is $kept")
    terminal.wait_for("kept is here")
    terminal.type("exit 9")
    terminal.wait_for("host>", 3)
    terminal.type("echo status $?")
    terminal.wait_for("status 9")
    assert cli.machines()[0]["exit_code"] == 9


def test_other_detach_keys_and_exec(cli: Cli, terminal: Tmux) -> None:
    cli.start(flags=("--name", "m"))
    terminal.type(f"{cli.argv()[0]} exec -it -e PS1='in> ' --detach-keys ctrl-a,d m sh")
    terminal.wait_for("\nin>")
    terminal.type("tty && stty size")
    terminal.wait_for("30 100")
    terminal.keys("C-p", "Enter")  # no detach key now: it reaches the shell, which repeats the line
    terminal.wait_for("30 100", 2)
    terminal.keys("C-a")
    terminal.keys("d")
    terminal.wait_for("host>", 2)
    terminal.type(f"{cli.argv()[0]} exec -t m sh -c 'exit 6'; echo status $?")
    terminal.wait_for("status 6")


def test_a_program_that_dies_leaves_the_terminal_as_it_was(cli: Cli, terminal: Tmux) -> None:
    terminal.type(_run(cli, "--name", "m"))
    terminal.wait_for("\nin>")
    cli.ok("kill", "m")
    terminal.wait_for("host>", 2)
    terminal.type("echo status $?; stty -a | grep -o ' echo '")
    terminal.wait_for("status 137")
    terminal.wait_for(" echo ", 2)


def test_progress_and_tables_fit_the_terminal(cli: Cli, terminal: Tmux) -> None:
    cli.start(flags=("--name", "a-rather-long-name-of-a-machine-that-does-not-fit", "-l", "x=y"))
    terminal.resize(60, 20)
    terminal.type(f"clear; {cli.argv()[0]} ps; echo done-$((1+1))")
    screen = terminal.wait_for("done-2")
    rows = [line for line in screen.splitlines() if line and not line.startswith(("host>", "done"))]
    assert len([line for line in rows if line.startswith("MACHINE ID")]) == 1
    assert all(len(line) <= 60 for line in rows), screen


def test_no_terminal_for_t(cli: Cli) -> None:
    ran = cli("run", "--rm", "-t", "-i", "--network", "none", "busybox", "tty", input="x\n")
    assert ran.code in (0, 125), ran
    if ran.code == 125:
        assert ran.err.startswith("nagaya: "), ran
        assert "terminal" in ran.err
