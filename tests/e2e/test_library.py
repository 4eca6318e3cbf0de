"""The library as a program uses it: the README's lines, and many threads on one host."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nagaya
from nagaya.errors import Conflict, ExecError, NotFound
from tests.e2e.command import Cli

SCRIPT = """
import threading
import nagaya

host = nagaya.Host()
machine = host.machines.create(nagaya.CreateOptions("busybox", command=("sleep", "600"), network="none", name="lib"))
machine.start()
done = machine.run(["sh", "-c", "cat; exit 3"], stdin=b"hello\\n")
assert done == (3, b"hello\\n", b""), done
results = []
threads = [threading.Thread(target=lambda n=n: results.append(machine.run(["echo", str(n)]).stdout)) for n in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert sorted(results) == [b"%d\\n" % n for n in range(8)], results
# A machine that a threaded program starts: no fork of this process.
stop = threading.Event()
waiting = threading.Thread(target=stop.wait)
waiting.start()
second = host.machines.create(nagaya.CreateOptions("busybox", command=("cat",), network="none", stdin=True))
with second.start(attach=True) as attachment:
    assert attachment.communicate(b"through\\n", timeout_s=20) == (0, b"through\\n", b"")
stop.set()
waiting.join()
second.remove()
machine.stop(timeout_s=0)
assert machine.state.phase == "exited"
machine.remove()
try:
    host.machines.get("lib")
except nagaya.NagayaError as error:
    print(type(error).__name__, error)
"""


def test_a_program_of_its_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env=cli.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("NotFound ")
    assert "lib" in done.stdout


@pytest.fixture
def host(cli: Cli) -> nagaya.Host:
    return nagaya.Host(root=cli.root)


def _start(host: nagaya.Host, *argv: str, name: str = "") -> nagaya.Machine:
    options = nagaya.CreateOptions("busybox", command=argv or ("sleep", "600"), network="none", name=name)
    machine = host.machines.create(options)
    machine.start()
    return machine


def test_every_status(host: nagaya.Host) -> None:
    machine = _start(host)
    for status in range(256):
        assert machine.run(["sh", "-c", f"exit {status}"]).exit_code == status
    with pytest.raises(ExecError) as caught:
        machine.run(["no-such-program"])
    assert caught.value.status == 127


def test_files_and_state(host: nagaya.Host, tmp_path: Path) -> None:
    machine = _start(host, name="files")
    payload = os.urandom(1 << 20)
    (tmp_path / "in").write_bytes(payload)
    machine.copy_in(str(tmp_path / "in"), "/root/in")
    machine.copy_out("/root/in", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == payload
    assert "/root/in" in [change.path for change in machine.diff() if change.kind == "A"]
    assert host.machines.get("files").state == machine.state
    with pytest.raises(Conflict):
        machine.remove()
    machine.remove(force=True)
    with pytest.raises(NotFound):
        _ = machine.state


def test_threads_share_one_host(host: nagaya.Host) -> None:
    def whole_life(number: int) -> tuple[int, bytes, str]:
        machine = _start(host, "sh", "-c", f"echo {number}; exit {number}")
        status = machine.wait()
        output = b"".join(line.data for line in machine.logs())
        machine.remove()
        return status, output, machine.id

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(whole_life, range(12)))
    assert [result[:2] for result in results] == [(n, b"%d" % n) for n in range(12)]
    assert len({result[2] for result in results}) == 12
    assert host.machines.list() == []


def test_no_descriptor_and_no_child_is_left(host: nagaya.Host) -> None:
    def once() -> None:
        machine = _start(host, "true")
        machine.wait()
        list(machine.logs())
        machine.remove()

    once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        once()
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_is_exported() -> None:
    for name in nagaya._HOMES:
        assert getattr(nagaya, name).__doc__
