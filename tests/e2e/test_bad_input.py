"""Everything a user can get wrong: one sentence, a hint, the right status, and nothing left behind."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.conftest import require_program
from tests.e2e.command import Cli, Ran

RUN = ("run", "--rm", "--network", "none")


def check(ran: Ran, code: int, pattern: str = "", *, hint: bool = True) -> None:
    """The last lines are the error: exactly one sentence, then its hint, no traceback."""
    assert ran.code == code, ran
    lines = ran.err.splitlines()
    errors = [line for line in lines if line.startswith("nagaya: ") and not line.startswith("nagaya: warning")]
    assert len(errors) == 1, ran
    at = lines.index(errors[0])
    hints = lines[at + 1 :]
    assert all(line.startswith("  hint: ") for line in hints), ran
    assert len(hints) <= 1, ran
    assert hints or not hint, ran
    assert not errors[0].endswith("."), ran
    assert re.search(pattern, ran.err), ran
    for word in ("Traceback", "internal error", "Errno", "nagaya.errors", 'File "'):
        assert word not in ran.err, ran


# A command line, its status, what its error says.
TABLE: list[tuple[tuple[str, ...], int, str]] = [
    # unknown things
    (("frobnicate",), 2, "unknown command"),
    (("statr", "m"), 2, "sta"),
    (("image", "frob"), 2, "unknown command"),
    (("run", "--frob", "busybox"), 125, "--frob"),
    (("ps", "--frob"), 2, "--frob"),
    ((*RUN, "--pull", "never", "no-such-image", "true"), 125, "no-such-image"),
    ((*RUN, "NOT A NAME", "true"), 125, ""),
    (("start", "no-such-machine"), 1, "no-such-machine"),
    (("exec", "no-such-machine", "true"), 125, "no-such-machine"),
        (("rmi", "no-such-image"), 1, "no-such-image"),
    (("volume", "rm", "no-such-volume"), 1, "no-such-volume"),
    (("cp", "no-such-machine:/x", "/tmp/nagaya-never"), 1, "no-such-machine"),
    # missing words
    (("run",), 125, ""),
    (("exec", "m"), 125, ""),
    (("tag", "busybox"), 2, ""),
    (("cp", "a", "b"), 2, ""),
    (("rm",), 2, ""),
    (("run", "--name"), 125, "--name"),
    (("--root",), 2, "--root"),
    # values
    ((*RUN, "--memory", "lots", "busybox", "true"), 125, "memory"),
    ((*RUN, "--memory", "-5m", "busybox", "true"), 125, "memory"),
    ((*RUN, "--memory", "1k", "busybox", "true"), 125, "memory"),
    ((*RUN, "--cpus", "0x2", "busybox", "true"), 125, "cpus"),
    ((*RUN, "--cpus", "nan", "busybox", "true"), 125, "cpus"),
    ((*RUN, "--cpuset-cpus", "banana", "busybox", "true"), 125, "cpuset"),
    ((*RUN, "--cpuset-cpus", "4000", "busybox", "true"), 125, ""),
    ((*RUN, "--pids-limit", "many", "busybox", "true"), 125, "pids-limit"),
    ((*RUN, "--blkio-weight", "1", "busybox", "true"), 125, "blkio-weight"),
    ((*RUN, "--name", "no/good", "busybox", "true"), 125, "no/good"),
    ((*RUN, "--name", "-x", "busybox", "true"), 125, ""),
    ((*RUN, "--network", "nowhere", "busybox", "true"), 125, "nowhere"),
    ((*RUN, "--restart", "sometimes", "busybox", "true"), 125, "sometimes"),
    (("run", "-d", "--rm", "--network", "none", "--restart", "always", "busybox", "true"), 125, ""),
    ((*RUN, "--cap-add", "FLY", "busybox", "true"), 125, "FLY"),
    ((*RUN, "--security-opt", "seccomp=/no/such/file", "busybox", "true"), 125, "/no/such/file"),
    ((*RUN, "--security-opt", "magic", "busybox", "true"), 125, "magic"),
    ((*RUN, "--ulimit", "nofile", "busybox", "true"), 125, "ulimit"),
    ((*RUN, "--ulimit", "nofiles=3", "busybox", "true"), 125, "nofiles"),
    ((*RUN, "--ulimit", "nofile=9:3", "busybox", "true"), 125, ""),
    ((*RUN, "--sysctl", "kernel.panic=1", "busybox", "true"), 125, "kernel.panic"),
    ((*RUN, "--sysctl", "../../etc=1", "busybox", "true"), 125, ""),
    ((*RUN, "--userns", "mine", "busybox", "true"), 125, "mine"),
    ((*RUN, "--user", "nobody-here", "busybox", "true"), 125, "nobody-here"),
    ((*RUN, "--user", "99999999999", "busybox", "true"), 125, ""),
    ((*RUN, "--stop-signal", "SIGWHAT", "busybox", "true"), 125, "SIGWHAT"),
    ((*RUN, "--type", "cardboard", "busybox", "true"), 125, "cardboard"),
    ((*RUN, "--platform", "plan9/mips", "busybox", "true"), 125, "plan9"),
    ((*RUN, "--env-file", "/no/such/file", "busybox", "true"), 125, "/no/such/file"),
    ((*RUN, "--device", "/dev/no-such-device", "busybox", "true"), 125, "/dev/no-such-device"),
    ((*RUN, "--device", "/etc/passwd", "busybox", "true"), 125, "/etc/passwd"),
    ((*RUN, "--log-opt", "colour=red", "busybox", "true"), 125, "colour"),
    ((*RUN, "--detach-keys", "ctrl-nonsense", "busybox", "true"), 125, ""),
    ((*RUN, "--add-host", "nocolon", "busybox", "true"), 125, ""),
    ((*RUN, "--dns", "not-an-address", "busybox", "true"), 125, "not-an-address"),
    # mounts
    ((*RUN, "-v", "/no/such/dir:/x", "busybox", "true"), 125, "/no/such/dir"),
    ((*RUN, "-v", "/tmp:relative", "busybox", "true"), 125, "relative"),
    ((*RUN, "-v", "/tmp:/x:sideways", "busybox", "true"), 125, "sideways"),
    ((*RUN, "-v", "/tmp:/", "busybox", "true"), 125, ""),
    ((*RUN, "-v", "bad/name:/x", "busybox", "true"), 125, "bad/name"),
    ((*RUN, "--mount", "type=magic,target=/x", "busybox", "true"), 125, "magic"),
    ((*RUN, "--mount", "type=bind,source=/no/such/dir,target=/x", "busybox", "true"), 125, "/no/such/dir"),
    ((*RUN, "--tmpfs", "/x:size=huge", "busybox", "true"), 125, "size"),
    # programs
    ((*RUN, "busybox", "no-such-program"), 127, "no-such-program"),
    ((*RUN, "busybox", "/no/such/program"), 127, "/no/such/program"),
    ((*RUN, "busybox", "/etc/passwd"), 126, "/etc/passwd"),
    ((*RUN, "busybox", "/etc"), 126, "/etc"),
    ((*RUN, "--entrypoint", "no-such-entry", "busybox"), 127, "no-such-entry"),
    ((*RUN, "--workdir", "/etc/passwd", "busybox", "true"), 126, "/etc/passwd"),
    # images
    (("pull", "oci:/no/such/dir"), 1, "/no/such/dir"),
    (("pull", "docker-archive:/no/such/file"), 1, "/no/such/file"),
    (("pull", "ftp://example.org/x"), 2, ""),
    (("pull", "a//b"), 2, ""),
    (("load", "-i", "/no/such/file"), 1, "/no/such/file"),
    (("load", "-i", "/etc/passwd"), 1, "/etc/passwd|archive"),
    (("import", "/no/such/file", "x"), 1, "/no/such/file"),
    (("import", "/etc/passwd", "x"), 1, ""),
    (("save", "-o", "/no/such/dir/file", "busybox"), 1, "/no/such/dir"),
    (("save", "--format", "zip", "-o", "/tmp/nagaya-never", "busybox"), 2, "zip"),
    (("tag", "busybox", "Upper"), 2, "Upper"),
    (("ps", "-f", "colour=red"), 2, "colour"),
    (("ps", "--format", "{{"), 2, ""),
    (("logs", "--since", "yesterday-ish", "m"), 2, ""),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "code", "pattern"), TABLE, ids=[" ".join(row[0])[:60] for row in TABLE])
def test_one_sentence_and_the_right_status(cli: Cli, argv: tuple[str, ...], code: int, pattern: str) -> None:
    ran = cli(*argv)
    check(ran, code, pattern, hint=False)
    assert ran.out == ""
    assert cli.machine_ids() == []
    assert not os.path.exists(f"{cli.root}/volumes") or os.listdir(f"{cli.root}/volumes") == []
    assert os.listdir(f"{cli.root}/names") == [] if os.path.isdir(f"{cli.root}/names") else True


def test_most_errors_have_a_hint(cli: Cli) -> None:
    """The ones that a user meets first, at least."""
    for argv in (
        ("frobnicate",),
        ("run", "--frob", "busybox"),
        ("start", "no-such-machine"),
        (*RUN, "--pull", "never", "no-such-image", "true"),
        (*RUN, "--memory", "lots", "busybox", "true"),
        (*RUN, "-v", "/no/such/dir:/x", "busybox", "true"),
        (*RUN, "--restart", "sometimes", "busybox", "true"),
        (*RUN, "--network", "nowhere", "busybox", "true"),
        (*RUN, "--type", "cardboard", "busybox", "true"),
        ("pull", "busybox:BAD TAG"),
        ("rm",),
    ):
        assert "\n  hint: " in cli(*argv).err, argv


def test_a_name_in_use(cli: Cli) -> None:
    cli.ok("create", "--network", "none", "--name", "taken", "busybox", "true")
    check(cli("create", "--network", "none", "--name", "taken", "busybox", "true"), 1, "taken.*in use")
    check(cli(*RUN, "--name", "taken", "busybox", "true"), 125, "taken.*in use")
    assert len(cli.machine_ids()) == 1


def test_wrong_moments(cli: Cli) -> None:
    cli.ok("create", "--network", "none", "--name", "m", "busybox", "sleep", "600")
    for verb in ("pause", "unpause", "kill", "attach", "top"):
        check(cli(verb, "m"), 1 if verb != "attach" else 125, "created")
    check(cli("exec", "m", "true"), 125, "created")
    cli.ok("start", "m")
    check(cli("start", "m"), 1, "running")
    check(cli("rm", "m"), 1, "running")
    check(cli("unpause", "m"), 1, "running", hint=False)
    check(cli("ps", "--format", "{{.Nope}}"), 2, "Nope", hint=False)
    missing = cli("inspect", "m", "no-such-thing")
    check(missing, 1, "no-such-thing")
    assert len(json.loads(missing.out)) == 1  # what is there is shown all the same


def test_broken_archives(empty_cli: Cli, cli: Cli, tmp_path: Path) -> None:
    cli.ok("save", "-q", "-o", str(tmp_path / "good.tar"), "busybox")
    good = (tmp_path / "good.tar").read_bytes()
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w") as tar:
        member = tarfile.TarInfo("../../../../tmp/nagaya-escaped")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    middle = good.index(b"\x1f\x8b") + 5000 if b"\x1f\x8b" in good else len(good) // 2
    cases = {
        "cut": good[: len(good) // 2],
        "empty": b"",
        "noise": os.urandom(200_000),
        "flipped": good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :],
        "gzip": gzip.compress(good)[:-1000],
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        check(empty_cli("load", "-q", "-i", str(path)), 1, hint=False)
        check(empty_cli("pull", "-q", f"oci-archive:{path}"), 1, hint=False)
        assert empty_cli.json("images", "--json") == [], name
    (tmp_path / "evil.tar").write_bytes(evil.getvalue())
    check(empty_cli("import", "-q", str(tmp_path / "evil.tar"), "evil"), 1, hint=False)
    assert not os.path.exists("/tmp/nagaya-escaped")
    assert empty_cli.json("images", "--json") == []
    images = f"{empty_cli.root}/images"
    for directory in ("blobs/sha256", "layers", "tmp", "partial"):
        if os.path.isdir(f"{images}/{directory}"):
            assert os.listdir(f"{images}/{directory}") == [], directory


FULL = """
set -e
mkdir -p "$1"
mount -t tmpfs -o size="$2" none "$1"
shift 2
"$@"
"""


def _on_small_disk(cli: Cli, size: str, script: str) -> Ran:
    """Run a shell script with the store on a small tmpfs, in a mount namespace that takes it away in the end."""
    require_program("unshare")
    argv = ["unshare", "-m", "sh", "-c", FULL, "sh", cli.root, size, "sh", "-c", script, "sh", *cli.argv()]
    done = subprocess.run(argv, capture_output=True, text=True, env=cli.env, timeout=60, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_full_disk(empty_cli: Cli, cli: Cli, tmp_path: Path) -> None:
    """Too small for the image: it is refused, and what was written goes."""
    cli.ok("save", "-q", "-o", str(tmp_path / "box.tar"), "busybox")
    check(_on_small_disk(empty_cli, "1m", f"$1 load -q -i {tmp_path}/box.tar"), 1, "No space left")
    leave = (
        f"$1 load -q -i {tmp_path}/box.tar 2>/dev/null; $1 images --json; find $NAGAYA_ROOT/images -type f -size +16k"
    )
    left = _on_small_disk(empty_cli, "1m", leave)
    assert left.out == "[]\n", left


def test_a_disk_that_fills_up_under_a_machine(empty_cli: Cli, cli: Cli, tmp_path: Path) -> None:
    """With no room for another record a start is refused in a sentence; the machine's own writes get ENOSPC."""
    cli.ok("save", "-q", "-o", str(tmp_path / "box.tar"), "busybox")
    load = f"$1 load -q -i {tmp_path}/box.tar >/dev/null && "
    own = (
        load
        + "$1 run --rm --network none busybox dd if=/dev/zero of=/big bs=64k 2>&1 | grep -o 'No space left' | sort -u; $1 ps -aq"
    )
    ran = _on_small_disk(empty_cli, "8m", own)
    assert ran.out == "No space left\n", ran
    fill = load + "dd if=/dev/zero of=$NAGAYA_ROOT/filler bs=4k 2>/dev/null; "
    ran = _on_small_disk(empty_cli, "8m", fill + "$1 run --rm --network none busybox true")
    check(ran, 125, "No space left")
    again = fill + "$1 run --rm --network none busybox true 2>/dev/null; rm $NAGAYA_ROOT/filler; $1 ps -a --json; ls $NAGAYA_ROOT/machines; $1 run --rm --network none busybox echo well"  # fmt: skip
    ran = _on_small_disk(empty_cli, "8m", again)
    assert (ran.code, ran.out) == (0, "[]\nwell\n"), ran


def test_a_plain_user(cli: Cli, tmp_path: Path) -> None:
    """On root's store, and on one of their own: a sentence and a way out, whatever they try."""
    require_program("setpriv")
    user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    if subprocess.run([*user, cli.argv()[0], "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this installation is out of a plain user's reach")
    foreign = Cli(cli.root, prefix=user)
    for argv, code in (((*RUN, "busybox", "true"), 125), (("ps", "-a"), 1), (("pull", "busybox"), 1)):
        check(foreign(*argv), code)
    home = tmp_path / "home"
    home.mkdir()
    for parent in (home, *home.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    os.chown(home, 65534, 65534)
    cli.ok("save", "-q", "-o", str(home / "box.tar"), "busybox")
    os.chmod(home / "box.tar", 0o644)
    own = Cli(str(home / "store"), prefix=user, env={"HOME": str(home)})
    assert own("ps", "-a").code == 0
    loaded = own("load", "-q", "-i", str(home / "box.tar"))
    if loaded.code:
        check(loaded, 1)
    else:
        check(own(*RUN, "busybox", "true"), 125)
    assert own.machine_ids() == []


def test_no_agent(cli: Cli) -> None:
    cli.env["NAGAYA_AGENT"] = "/nonexistent"
    check(cli(*RUN, "busybox", "true"), 125, "/nonexistent")
    cli.env["NAGAYA_AGENT"] = "/etc/passwd"
    check(cli(*RUN, "busybox", "true"), 125, "agent")
    assert cli.machine_ids() == []


def test_damaged_records(own_cli: Cli) -> None:
    """State on disk is untrusted: what is damaged is named, and can be removed."""
    for name in ("spec", "state"):
        id_ = own_cli.ok("create", "--network", "none", "--name", name, "busybox", "true").strip()
        for content in ("", "{", "[]", '{"phase": 3}', "\0" * 100, "[" * 100_000):
            Path(f"{own_cli.root}/machines/{id_}/{name}.json").write_text(content)
            listed = own_cli("ps", "-a")
            assert listed.code == 0, listed  # the other machines are shown all the same
            assert "internal error" not in listed.err, listed
            if name == "spec":  # a state is found out again; what a machine was to be cannot be
                assert "nagaya rm -f" in listed.err, listed
                check(own_cli("start", name), 1, "nagaya rm -f", hint=True)
                check(own_cli("inspect", name), 1, hint=False)
            else:
                assert own_cli("inspect", name).code == 0
        removed = own_cli("rm", "-f", name)
        assert removed.code == 0, removed
    assert own_cli.machine_ids() == []


def test_standard_output_that_is_full_or_closed(cli: Cli) -> None:
    for words in (("ps",), ("images",), ("inspect", "busybox"), ("--help",), (*RUN, "busybox", "echo", "x")):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(cli.argv(*words), stdout=full, stderr=subprocess.PIPE, env=cli.env, check=False)
        assert b"Traceback" not in done.stderr, done
        assert done.returncode != 0, (words, done)
        closed = subprocess.run(
            ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", *cli.argv(*words)], env=cli.env, check=False
        )
        assert closed.returncode in (0, 1, 125), (words, closed)
