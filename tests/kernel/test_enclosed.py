"""Programs that nothing is left of: the namespace that mmdebstrap builds a machine's disk in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nagaya.images.enclosed import enclose
from nagaya.storage.disk_images import store
from tests.conftest import require_program

WITHIN_S = 20.0
# Each of the two has left its parent's session and process group; the first ignores what it can.
TREE = "trap '' TERM INT HUP; setsid sh -c 'echo $$ > {0}/deep; sleep 1000 & wait' & setsid sleep 1000 & {1}"


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


def running(word: str) -> list[int]:
    """Pids of all processes with that word among their arguments or in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if word.encode() in text and int(pid) != os.getpid():
            found.append(int(pid))
    return found


def wait_until_none(word: str) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while left := running(word):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.02)


def test_it_is_a_program_as_any_other(tmp_path: Path) -> None:
    for script, status in (("exit 0", 0), ("exit 7", 7), ("kill -9 $$; exit 3", 3), ("echo $$; echo e >&2", 0)):
        # The first process of a namespace is not killed from inside.
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, preexec_fn=enclose(lambda: None))
        assert done.returncode == status, script
    assert (done.stdout, done.stderr) == ("1\n", "e\n")
    with pytest.raises(FileNotFoundError):
        subprocess.run(["/no/such/program"], preexec_fn=enclose(lambda: None))
    place = tmp_path / "mounted"
    place.mkdir()
    script = f"mount -t tmpfs none {place} && touch {place}/x && ls {place}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, preexec_fn=enclose(lambda: None))
    assert (done.stdout, os.listdir(place)) == ("x\n", [])


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    word = f"enclosed-{os.getpid()}"
    script = TREE.format(tmp_path, f"while [ ! -s {tmp_path}/deep ]; do sleep 0.01; done; exit 5")
    done = subprocess.run(["sh", "-c", script], env={**os.environ, "MARK": word}, preexec_fn=enclose(lambda: None))
    assert done.returncode == 5
    wait_until_none(word)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
def test_it_ends_with_us(tmp_path: Path, number: signal.Signals, foreign: bool) -> None:
    """As `nagaya machine build` runs mmdebstrap: in a process group that no terminal's Ctrl-C reaches; and in a user namespace."""
    word = f"enclosed-{os.getpid()}-{number}-{foreign}"
    script = TREE.format(tmp_path, "sleep 1000")
    if foreign:
        require_program("qemu-aarch64-static")
    code = (
        "import contextlib, subprocess\nfrom nagaya.images.enclosed import enclose\n"
        "from nagaya.images.foreign import foreign_programs\n"
        f"with foreign_programs('aarch64') if {foreign} else contextlib.nullcontext(lambda: None) as enter:\n"
        f"    subprocess.run(['sh', '-c', {script!r}], capture_output=True, process_group=0, preexec_fn=enclose(enter))"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "MARK": word}, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + WITHIN_S
    while not (tmp_path / "deep").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert len(running(word)) >= 5
    ours.send_signal(number)
    ours.wait(WITHIN_S)
    wait_until_none(word)


def test_a_builder_is_killed(tmp_path: Path) -> None:
    """mmdebstrap's place is taken by what looks like it; the next build removes the tree that it left."""
    from tests.e2e.command import Cli

    programs, root, word = tmp_path / "bin", tmp_path / "store", f"built-{os.getpid()}"
    programs.mkdir()
    (programs / "mmdebstrap").write_text(f"#!/bin/sh\n{TREE.format(tmp_path, 'sleep 1000')}\n")
    (programs / "mmdebstrap").chmod(0o755)
    cli = Cli(str(root), env={"PATH": f"{programs}:{os.environ['PATH']}", "MARK": word})
    builder = subprocess.Popen(cli.argv("machine", "build", "debian", "x"), env=cli.env, stderr=subprocess.PIPE)
    deadline_s = time.monotonic() + WITHIN_S
    while not (tmp_path / "deep").exists():
        assert time.monotonic() < deadline_s and builder.poll() is None, builder.stderr
        time.sleep(0.02)
    builder.kill()
    builder.communicate()
    wait_until_none(word)
    disks = store.Disks(str(root)).directory
    (left,) = (name for name in os.listdir(disks) if name.startswith(".build-") and name != ".build-lock")
    (programs / "mmdebstrap").write_text("#!/bin/sh\necho 'E: no' >&2\nexit 1\n")
    ran = cli("machine", "build", "debian", "x")
    assert ran.code == 1 and "mmdebstrap: no" in ran.err, ran
    assert not os.path.exists(f"{disks}/{left}")
