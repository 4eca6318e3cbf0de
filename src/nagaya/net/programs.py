"""Running nft and dnsmasq. Not by `subprocess`: importing it takes 16 ms of a 50 ms `run`."""

from __future__ import annotations

import os

from nagaya.static import NamedTuple

PATH = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"
MOST_SAID = 64 << 10


class Started(NamedTuple):
    """A program that runs. `said` is a descriptor of what it writes on its standard error."""

    pid: int
    said: int


class Ended(NamedTuple):
    """`status` is as a shell has it; `text` what it wrote on its standard error."""

    status: int
    text: str


def find(name: str) -> str:
    """A program's path: in PATH, or where only root's has one. Raises `FileNotFoundError`."""
    for directory in f"{os.environ.get('PATH', '')}:{PATH}".split(":"):
        if directory and os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    raise FileNotFoundError(2, "no such program", name)


def start(argv: list[str], text: str = "") -> Started:
    """Start it with `text` on its standard input. Raises `FileNotFoundError` when it is not installed."""
    program = find(argv[0])
    given = os.memfd_create("input", os.MFD_CLOEXEC)
    said, saying = os.pipe2(os.O_CLOEXEC)
    try:
        data = memoryview(text.encode("utf-8", "surrogateescape"))
        while data:
            data = data[os.write(given, data) :]
        os.lseek(given, 0, os.SEEK_SET)
        actions = [
            (os.POSIX_SPAWN_DUP2, given, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, saying, 2),
        ]
        environment = {**os.environ, "LC_ALL": "C"}
        pid = os.posix_spawn(program, argv, environment, file_actions=actions, setsigdef=(2, 3, 13, 15, 1))
    except BaseException:
        os.close(said)
        raise
    finally:
        os.close(given)
        os.close(saying)
    return Started(pid, said)


def finish(started: Started) -> Ended:
    """Wait for its end. What it has left running (dnsmasq's daemon) does not count."""
    said = b""
    try:
        _, status = os.waitpid(started.pid, 0)
        os.set_blocking(started.said, False)
        while len(said) < MOST_SAID and (chunk := os.read(started.said, MOST_SAID)):
            said += chunk
    except BlockingIOError:
        pass  # its daemon holds the other end still
    finally:
        os.close(started.said)
    return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace").strip())


def run(argv: list[str], text: str = "") -> Ended:
    """Start it and wait. A pipe's room (64 KiB) is more than these programs have to complain about."""
    return finish(start(argv, text))
