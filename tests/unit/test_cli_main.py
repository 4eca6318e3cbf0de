"""Whole command lines on a host that is made up: what the manager is asked, what is printed, which status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nagaya.cli import main
from nagaya.cli.context import Context
from nagaya.engines.base import Stats
from nagaya.errors import Conflict, ExecError, LaunchError, NotFound
from nagaya.images.image import Image, ImageConfig
from nagaya.manager.options import CreateOptions, UpdateOptions
from nagaya.manager.processes import ProcessRow
from nagaya.model.spec import Limits, MachineSpec, Mount, Process, Restart
from nagaya.model.state import EXITED, RUNNING, MachineState
from nagaya.storage.events import Event
from nagaya.storage.logs import LogLine
from nagaya.storage.volumes import Volume

SOURCE = str(Path(__file__).resolve().parents[2] / "src")


class FakeMachine:
    """Records what it is asked."""

    def __init__(self, calls: list[Any], name: str, id: str, *, phase: str = RUNNING, **spec: Any) -> None:
        self.calls = calls
        self.name = name
        self.id = id
        self.directory = "/nonexistent"
        fields: dict[str, Any] = {
            "type": "container", "image": "debian", "image_id": "sha256:00", "platform": "linux/amd64",
            "process": Process(argv=("sleep", "1")), "hostname": name, "created_ns": time.time_ns(), **spec,
        }  # fmt: skip
        self.spec = MachineSpec(id=id, name=name, **fields)
        self.state = MachineState(phase=phase, exit_code=3, started_ns=time.time_ns(), finished_ns=time.time_ns())

    def __getattr__(self, verb: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((verb, self.name, *args, kwargs) if kwargs else (verb, self.name, *args))
            return None

        return call

    def stop(self, *, timeout_s: float | None = None) -> None:
        if self.name == "stuck":
            raise Conflict("machine 'stuck' cannot be stopped", hint="try again")
        self.calls.append(("stop", self.name, timeout_s))

    def wait(self) -> int:
        return 3

    def top(self) -> list[ProcessRow]:
        return [ProcessRow(1, 0, "root", 61.0, 1 << 20, "sleep\x1b 1")]

    def stats(self) -> Stats:
        return Stats(cpu_ns=1, memory_bytes=1 << 20, pids=-1)

    def update(self, options: UpdateOptions) -> list[str]:
        self.calls.append(("update", self.name, options))
        return ["memory limit: none -> 1 (now)"]

    def logs(self, **kwargs: Any) -> Iterator[LogLine]:
        self.calls.append(("logs", kwargs))
        yield LogLine(1_795_440_000_000_000_000, "stdout", b"a \xff", partial=False)
        yield LogLine(1_795_440_000_000_000_001, "stdout", b"b", partial=True)
        yield LogLine(1_795_440_000_000_000_002, "stdout", b"c", partial=False)
        yield LogLine(1_795_440_000_000_000_003, "stderr", b"e", partial=False)

    def inspect(self) -> dict[str, object]:
        return {"id": self.id, "name": self.name, "process": {"argv": ["x"]}, "state": {"phase": self.state.phase}}

    def diff(self) -> list[Any]:
        return [SimpleNamespace(kind="A", path="/new\nline")]


Machines = list[FakeMachine]  # `FakeHost.list` hides the type's name in its class
Ids = list[str]


class FakeHost:
    """Machines web, db, stuck; image app; volume data."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.all = [
            FakeMachine(self.calls, "web", "a" * 32, labels=(("tier", "front"),)),
            FakeMachine(self.calls, "db", "b" * 32, phase=EXITED),
            FakeMachine(self.calls, "stuck", "c" * 32),
        ]
        self.machines = self
        self.damaged: Any = list
        self.volumes = SimpleNamespace(
            list=lambda: [Volume("data", "/v/data", 1)],
            create=lambda name, labels: Volume(name or "made-up", "/v", 1, labels),
            get=lambda name: Volume("data", "/v/data", 1) if name == "data" else self._missing(name),
            remove=lambda name, force, in_use: self.calls.append(("volume rm", name, force, in_use)),
        )
        image = Image("sha256:" + "0" * 64, "sha256:d", ("app:1",), "linux/amd64", 1, 10, (), ImageConfig(), "registry")
        self.images = SimpleNamespace(
            list=lambda: [image],
            inspect=lambda name: {"id": image.id} if name == "app" else self._missing(name),
            pull=self._pull,
            remove=lambda name, force, in_use: [f"untagged: {name}"],
            prune=lambda all, in_use: SimpleNamespace(removed=("sha256:1",), bytes_freed=1000),
        )

    def _pull(self, reference: str, **options: Any) -> Image:
        self.calls.append(("pull", reference, options["platform"], options["insecure"]))
        image: Image = self.images.list()[0]
        return image

    def _missing(self, name: str) -> Any:
        raise NotFound(f"there is no '{name}'", hint="look")

    def get(self, name: str) -> FakeMachine:
        for machine in self.all:
            if name in (machine.name, machine.id):
                return machine
        raise NotFound(f"there is no machine '{name}'", hint="'nagaya ps -a' lists them all")

    def list(self) -> Machines:
        return self.all

    def create(self, options: CreateOptions, **rest: Any) -> FakeMachine:
        self.calls.append(("create", options))
        return FakeMachine(self.calls, options.name or "made-up", "d" * 32)

    def image_ids(self) -> frozenset[str]:
        return frozenset()

    def volume_names(self) -> frozenset[str]:
        return frozenset({"used"})

    def prune(self) -> Ids:
        return ["b" * 32]

    def events(self, **kwargs: Any) -> Iterator[Event]:
        self.calls.append(("events", kwargs))
        yield Event(1_795_440_000_000_000_000, "machine", "start", "a" * 32, "web", {"image": "debian"})
        yield Event(1_795_440_000_000_000_001, "machine", "die", "a" * 32, "web", {"exit_code": "0"})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    made = FakeHost()
    monkeypatch.setattr("nagaya.supervisor.launch._may_fork", False)  # `start` and `run` set it; ours must not keep it
    monkeypatch.setattr(Context, "host", property(lambda self: made))
    return made


Out = pytest.CaptureFixture[str]


# -- what the manager is asked


def test_create_passes_everything_on(host: FakeHost, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_DEFAULT_PLATFORM", raising=False)
    line = (
        "create --name x -it --rm -e A=1 -v /srv:/data:ro -w /w -u 1:2 --entrypoint /bin/sh -h box -l k=v --net none"
        " --cpus 1.5 -m 512m --pids-limit 10 --cpuset-cpus 0-1 --blkio-weight 500 --storage 20g --read-only --cap-drop ALL"
        " --ulimit nofile=1:2 --sysctl a.b=1 --init=false --userns auto --stop-signal INT"
        " --stop-timeout 1m --dns 1.1.1.1 --add-host db:10.0.0.1 --pull never --platform linux/arm64 debian ls -l"
    )
    assert main(line.split()) == 0
    assert capsys.readouterr().out == "d" * 32 + "\n"
    ((_, options),) = host.calls
    assert options == CreateOptions(
        image="debian", command=("ls", "-l"), entrypoint=("/bin/sh",), type="container", name="x", platform="linux/arm64", pull="never",
        env=("A=1",), workdir="/w", user="1:2", hostname="box", tty=True, stdin=True, init=False, read_only=True,
        userns="auto", network="none", mounts=(Mount("bind", "/srv", "/data", True),), devices=(),
        ulimits=options.ulimits, sysctls=(("a.b", "1"),), security=options.security,
        limits=Limits(512 << 20, 1500, 10, "0-1", storage_bytes=20 << 30, blkio_weight=500), restart=Restart(), auto_remove=True, stop_signal=2,
        stop_timeout_s=60.0, labels=(("k", "v"),), dns=("1.1.1.1",), extra_hosts=(("db", "10.0.0.1"),),
    )  # fmt: skip


def test_defaults_leave_the_image_its_say(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_DEFAULT_PLATFORM", raising=False)
    assert main(["create", "debian"]) == 0
    assert host.calls[0][1] == CreateOptions(image="debian", type="container")  # which the suite has settled


def test_an_empty_entrypoint_clears_the_images(host: FakeHost) -> None:
    assert main(["create", "--entrypoint", "", "debian", "ls"]) == 0
    assert host.calls[0][1].entrypoint == ()


def test_the_default_platform_comes_from_the_environment(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_DEFAULT_PLATFORM", "linux/arm64")
    assert main(["create", "debian"]) == 0
    assert host.calls[0][1].platform == "linux/arm64"


def test_a_cidfile_is_new(host: FakeHost, tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "cid"
    assert main(["create", "--cidfile", str(path), "debian"]) == 0
    assert path.read_text() == "d" * 32
    assert main(["create", "--cidfile", str(path), "debian"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_run_detached_prints_the_id(host: FakeHost, capsys: Out) -> None:
    assert main(["run", "-d", "debian"]) == 0
    assert capsys.readouterr().out == "d" * 32 + "\n"
    assert [call[0] for call in host.calls] == ["create", "start"]


def test_it_without_a_terminal_is_refused_before_anything_is_made(host: FakeHost, capsys: Out) -> None:
    code = "import sys; from nagaya.cli import main; sys.exit(main(['run', '-it', 'debian']))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": SOURCE}, check=False,
    )  # fmt: skip
    assert done.returncode == 125
    assert done.stderr.startswith("nagaya: the input device is not a terminal\n  hint: ")


def test_several_names_each_get_their_turn(host: FakeHost, capsys: Out) -> None:
    assert main(["stop", "-t", "1m30s", "none", "web", "stuck", "db"]) == 1
    assert host.calls == [("stop", "web", 90.0), ("stop", "db", 90.0)]
    captured = capsys.readouterr()
    assert captured.out == "web\ndb\n"
    assert captured.err.splitlines() == [
        "nagaya: there is no machine 'none'",
        "  hint: 'nagaya ps -a' lists them all",
        "nagaya: machine 'stuck' cannot be stopped",
        "  hint: try again",
    ]


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        (["stop", "web"], ("stop", "web", None)),
        (["kill", "web"], ("kill", "web", 9)),
        (["kill", "-s", "HUP", "web"], ("kill", "web", 1)),
        (["pause", "web"], ("pause", "web")),
        (["unpause", "web"], ("unpause", "web")),
        (["restart", "-t", "1", "web"], ("restart", "web", {"timeout_s": 1.0})),
        (["rename", "web", "w2"], ("rename", "web", "w2")),
        (["rm", "-fv", "web"], ("remove", "web", {"force": True, "volumes": True})),
        (["rm", "web"], ("remove", "web", {"volumes": False})),
        (["machine", "rm", "web"], ("remove", "web", {"volumes": False})),
        (["cp", "web:/a", "b"], ("copy_out", "web", "/a", "b", {"follow_links": False, "archive": False})),
        (["cp", "-aL", "./b:c", "web:/a"], ("copy_in", "web", "./b:c", "/a", {"follow_links": True, "archive": True})),
        (["update", "-m", "1g", "web"], ("update", "web", UpdateOptions(memory_bytes=1 << 30))),
        (["update", "--pids-limit", "-1", "web"], ("update", "web", UpdateOptions(pids=0))),
        (["volume", "rm", "-f", "data"], ("volume rm", "data", True, frozenset({"used"}))),
        (["pull", "-q", "--platform", "linux/arm64", "debian"], ("pull", "debian", "linux/arm64", False)),
        (["image", "pull", "-q", "--insecure", "--platform=x/y", "a"], ("pull", "a", "x/y", True)),
    ],
)
def test_verbs(host: FakeHost, argv: list[str], call: tuple[Any, ...]) -> None:
    assert main(argv) == 0
    assert host.calls == [call]


# -- what is printed


def test_ps_lists_what_runs(host: FakeHost, capsys: Out) -> None:
    assert main(["ps", "--format", "{{.Names}} {{.State}}"]) == 0
    assert capsys.readouterr().out == "web running\nstuck running\n"
    assert main(["ps", "-aq"]) == 0
    assert capsys.readouterr().out.split() == ["a" * 12, "b" * 12, "c" * 12]
    assert main(["ps", "-q", "--no-trunc", "--filter", "status=exited"]) == 0
    assert capsys.readouterr().out.split() == ["b" * 32]
    assert main(["ps", "-l", "--format", '{{.Label "tier"}}']) == 0
    assert capsys.readouterr().out == "front\n"
    assert main(["ps", "-n", "2", "-q"]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    assert main(["ps", "--json"]) == 0
    assert [machine["name"] for machine in json.loads(capsys.readouterr().out)] == ["web", "stuck"]
    assert main(["ps"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("   ")[0] == "MACHINE ID"


def test_logs_go_to_their_streams(host: FakeHost, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["logs", "-t", "--tail", "5", "web"]) == 0
    captured = capfdbinary.readouterr()
    assert captured.out == (b"2026-11-23T13:20:00.000000000Z a \xff\n2026-11-23T13:20:00.000000001Z bc\n")
    assert captured.err == b"2026-11-23T13:20:00.000000003Z e\n"
    assert host.calls == [("logs", {"follow": False, "since_ns": 0, "until_ns": 0, "tail": 5})]


def test_inspect_finds_machines_then_images_then_volumes(host: FakeHost, capsys: Out) -> None:
    assert main(["inspect", "web", "app", "data"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [next(iter(item.values())) for item in found] == ["a" * 32, "sha256:" + "0" * 64, "data"]
    assert main(["inspect", "-f", "{{.State.Status}}", "web"]) == 0
    assert capsys.readouterr().out == "running\n"
    assert main(["inspect", "web", "nothing"]) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 1
    assert "there is no machine, image or volume 'nothing'" in captured.err
    assert main(["inspect", "--type", "image", "web"]) == 1
    assert main(["volume", "inspect", "data"]) == 0


def test_wait_top_stats_diff_update(host: FakeHost, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nagaya.cli.commands.stats.INTERVAL_S", 0.0)
    assert main(["wait", "web", "db"]) == 0
    assert capsys.readouterr().out == "3\n3\n"
    assert main(["top", "web"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "0", "root", "00:01:01", "1MiB", "sleep?", "1"]
    assert main(["stats", "--no-stream", "--format", "{{.Name}} {{.CPUPerc}} {{.PIDs}} {{.NetIO}}", "web"]) == 0
    assert capsys.readouterr().out == "web 0.00% -- --\n"
    assert main(["stats", "--json", "web"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["memory_bytes"] == 1 << 20
    assert main(["diff", "web"]) == 0
    assert capsys.readouterr().out == "A /new\\nline\n"
    assert main(["update", "-m", "1", "web"]) == 0
    assert capsys.readouterr().out == "web\n  memory limit: none -> 1 (now)\n"


def test_events(host: FakeHost, capsys: Out) -> None:
    assert main(["events", "--since", "1795440000", "--until", "1795440001", "--filter", "event=die"]) == 0
    assert capsys.readouterr().out == (
        f"2026-11-23T13:20:00.000000001Z machine die {'a' * 32} (exit_code=0, name=web)\n"
    )
    assert host.calls[0][1]["follow"] is (time.time_ns() < 1_795_440_001 * 10**9)
    assert main(["events", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["action"] == "start"
    assert main(["events", "--format", "{{.Action}} {{.Actor.Attributes.name}} {{.TimeNano}}"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "start web 1795440000000000000"


def test_prune_asks_somebody(host: FakeHost, capsys: Out) -> None:
    assert main(["prune"]) == 2
    assert "-f removes without asking" in capsys.readouterr().err
    assert main(["prune", "-f"]) == 0
    assert capsys.readouterr().out == f"{'b' * 32}\nsha256:1\nFreed 1kB of images\n"
    assert main(["image", "prune", "-f", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": ["sha256:1"], "image_bytes_freed": 1000}


def test_images_volumes_version_completion(host: FakeHost, capsys: Out) -> None:
    assert main(["images", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}"]) == 0
    assert capsys.readouterr().out == "app:1 10B\n"
    assert main(["images", "other"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["volume", "ls", "-q"]) == 0
    assert capsys.readouterr().out == "data\n"
    assert main(["volume", "create", "-l", "a=1", "v"]) == 0
    assert capsys.readouterr().out == "v\n"
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "__complete" in capsys.readouterr().out
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ru"], ["run"]),
        (["volume", "c"], ["create"]),
        (["stop", ""], ["web", "db", "stuck"]),
        (["stop", "w"], ["web"]),
        (["run", "--net", ""], ["bridge", "host", "none", "user"]),
        (["run", "--cpus", ""], []),
        (["run", "-it", "a"], ["app:1"]),
        (["run", "debian", ""], []),
        (["run", "--cpu"], ["--cpus", "--cpuset-cpus"]),
        (["exec", "-it", "d"], ["db"]),
        (["exec", "db", "w"], []),
        (["cp", "w"], ["web:"]),
        (["inspect", "a"], ["app:1"]),
        (["volume", "rm", ""], ["data"]),
        (["help", "ru"], ["run"]),
        (["nonsense", ""], []),
    ],
)
def test_completion(host: FakeHost, capsys: Out, words: list[str], found: list[str]) -> None:
    assert main(["__complete", "--", *words]) == 0
    assert capsys.readouterr().out.split() == found


# -- failures


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (["nonsense"], 2, "unknown command 'nagaya nonsense'"),
        (["rnu"], 2, "did you mean 'run'?"),
        (["container", "ls"], 2, "nagaya machine"),
        (["volume", "mv"], 2, "unknown command 'nagaya volume mv'"),
        (["--bogus", "ps"], 2, "unknown flag --bogus for 'nagaya'"),
        (["--root"], 2, "needs a value"),
        (["--root=", "ps"], 2, "not an empty text"),
        (["run", "--bogus", "debian"], 125, "unknown flag --bogus"),
        (["run", "-m", "lots", "debian"], 125, "--memory: 'lots' is not a size"),
        (["run", ""], 125, "the image's name is empty"),
        (["exec", "none", "ls"], 125, "there is no machine 'none'"),
        (["create", "--pull", "maybe", "debian"], 2, "unknown policy 'maybe'"),
        (["cp", "a", "b"], 2, "must be MACHINE:PATH"),
        (["cp", "web:a", "db:b"], 2, "nagaya cp web:a - | nagaya cp - db:b"),
        (["start", "-a", "web", "db"], 2, "only one machine"),
        (["start", "-a", "none"], 125, "there is no machine"),
        (["save", "--format", "zip", "app"], 2, "unknown format"),
        (["completion", "tcsh"], 2, "bash, zsh, fish"),
        (["help", "nonsense"], 2, "unknown command"),
    ],
)
def test_errors_are_a_sentence_a_hint_and_a_status(
    host: FakeHost, capsys: Out, argv: list[str], status: int, text: str
) -> None:
    assert main(argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nagaya: ")
    assert text in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ExecError("no such program", status=127), 127, "nagaya: no such program\n"),
        (LaunchError("qemu failed", log_tail="line 1\nline\x1b 2"), 125, "  | line 1\n  | line\\x1b 2\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (OSError(28, "No space left on device", "/x"), 125, "No space left on device (/x)\n  hint: free some space"),
        (ZeroDivisionError("division by zero"), 125, "internal error: ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_is_raised_has_its_status(
    host: FakeHost, capsys: Out, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, status: int,
    text: str,
) -> None:  # fmt: skip
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("NAGAYA_DEBUG", raising=False)
    monkeypatch.setattr(host, "create", fail)
    assert main(["run", "-d", "-e", "SECRET=1", "debian"]) == status
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    reports = list(tmp_path.iterdir())
    assert bool(reports) is isinstance(error, ZeroDivisionError)
    for report in reports:
        assert "Traceback" in report.read_text()
        assert "SECRET" not in report.read_text().partition("Traceback")[0]
        assert report.stat().st_mode & 0o077 == 0


def test_debug_shows_the_traceback(host: FakeHost, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAGAYA_DEBUG", "1")
    assert main(["rename", "none", "x"]) == 1
    assert "Traceback" in capsys.readouterr().err


def _nagaya(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nagaya", *argv],
        env={**os.environ, "PYTHONPATH": SOURCE},
        text=True,
        check=False,
        **options,
    )


def test_a_reader_that_leaves_makes_no_noise() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        done = _nagaya("run", "--help", stdout=out, stderr=subprocess.PIPE)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_a_full_disk_is_a_failure() -> None:
    with open("/dev/full", "w") as out:
        done = _nagaya("--help", stdout=out, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_closed_standard_streams_are_survived() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} -m nagaya version <&- >&- 2>&-"],
        env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
