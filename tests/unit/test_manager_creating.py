"""From options and an image to a record: Docker's rules, and one clear sentence for what could not work."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from nagaya.errors import UsageError
from nagaya.manager import creating
from nagaya.manager.naming import check_name, generate_name
from nagaya.manager.options import CreateOptions, ExecOptions, UpdateOptions
from nagaya.manager.updating import describe, plan_update
from nagaya.model.spec import Limits, LogLimits, MachineSpec, Mount, Process, Restart


class _Config(NamedTuple):
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()


class _Image(NamedTuple):
    config: Any
    id: str = "sha256:1"
    platform: str = creating.host_platform()


@pytest.fixture(autouse=True)
def _any_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def check(self, spec: MachineSpec) -> list[str]:
            return []

    monkeypatch.setattr(creating, "open_engine", lambda type_: Engine())


EMPTY = _Config()


def _plan(config: _Config = EMPTY, **options: Any) -> MachineSpec:
    options.setdefault("command", ())
    image: Any = _Image(config)
    return creating.plan_machine(
        CreateOptions("img", **options), image, type_="container", machine_id="ab" * 16, name="n"
    )


@pytest.mark.parametrize(
    ("entrypoint", "command", "given_entrypoint", "given_command", "argv"),
    [
        ((), ("sh",), None, (), ("sh",)),
        ((), ("sh",), None, ("ls", "-l"), ("ls", "-l")),
        (("run",), ("a",), None, (), ("run", "a")),
        (("run",), ("a",), None, ("b",), ("run", "b")),
        (("run",), ("a",), ("other",), (), ("other",)),
        (("run",), ("a",), (), ("ls",), ("ls",)),
    ],
)
def test_entrypoint_and_command(
    entrypoint: tuple[str, ...],
    command: tuple[str, ...],
    given_entrypoint: tuple[str, ...] | None,
    given_command: tuple[str, ...],
    argv: tuple[str, ...],
) -> None:
    spec = _plan(_Config(entrypoint, command), entrypoint=given_entrypoint, command=given_command)
    assert spec.process.argv == argv


def test_environment_is_merged_in_order() -> None:
    env = _plan(_Config(command=("x",), env=("A=1", "B=2")), env=("B=3", "C="), tty=True).process.env
    assert dict(pair.split("=", 1) for pair in env) == {
        "PATH": creating.DEFAULT_PATH, "HOSTNAME": "abababababab", "TERM": "xterm", "A": "1", "B": "3", "C": "",
    }  # fmt: skip


def test_the_image_s_settings_hold_unless_replaced() -> None:
    config = _Config(command=("x",), workdir="/w", user="u", stop_signal="SIGQUIT", labels=(("a", "1"),))
    spec = _plan(config)
    assert (spec.process.workdir, spec.process.user, spec.stop_signal) == ("/w", "u", 3)
    spec = _plan(config, workdir="/v", user="", stop_signal=9, labels=(("a", "2"), ("b", "3")))
    assert (spec.process.workdir, spec.process.user, spec.stop_signal) == ("/v", "", 9)
    assert dict(spec.labels) == {"a": "2", "b": "3"}


def test_declared_volumes_become_anonymous_ones_unless_mounted_over() -> None:
    spec = _plan(_Config(command=("x",), volumes=("/data", "/other/")), mounts=(Mount("bind", "/tmp", "/other"),))
    assert [(mount.target, mount.anonymous) for mount in spec.mounts] == [("/other", False), ("/data", True)]


@pytest.mark.parametrize(
    ("text", "number"), [("", 15), ("SIGINT", 2), ("HUP", 1), ("9", 9), ("nonsense", 15), ("99", 15)]
)
def test_stop_signals(text: str, number: int) -> None:
    assert creating.parse_stop_signal(text) == number


@pytest.mark.parametrize(
    "options",
    [
        {"command": ()},
        {"command": ("",)},
        {"command": ("a\0b",)},
        {"env": ("NOVALUE",)},
        {"env": ("=x",)},
        {"workdir": "relative"},
        {"hostname": "under_score"},
        {"hostname": "x" * 64},
        {"network": "moon"},
        {"userns": "yes"},
        {"restart": Restart("sometimes")},
        {"restart": Restart("always"), "auto_remove": True},
        {"stop_timeout_s": -1.0},
        {"stop_signal": 99},
        {"limits": Limits(memory_bytes=1000)},
        {"limits": Limits(cpus_milli=10**9)},
        {"limits": Limits(blkio_weight=5)},
        {"limits": Limits(storage_bytes=1)},
        {"limits": Limits(storage_bytes=(64 << 20) - 1)},
        {"log": LogLimits(files=0)},
        {"log": LogLimits(max_bytes=1)},
        {"mounts": (Mount("tmpfs", "", "relative"),)},
        {"mounts": (Mount("tmpfs", "", "/"),)},
        {"mounts": (Mount("tmpfs", "", "/a"), Mount("tmpfs", "", "/a/"))},
        {"mounts": (Mount("bind", "/", "/a", propagation="sideways"),)},
    ],
)
def test_what_could_not_work_is_refused_in_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        _plan(_Config(command=()), **{"command": ("x",), **options})
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")


def test_exec_inherits_from_the_main_program() -> None:
    main = Process(("x",), env=("A=1", "B=2"), workdir="/w", user="u")
    process = creating.plan_exec(ExecOptions(("ls",), env=("B=3",), tty=True), main)
    assert process.env == ("A=1", "B=3", "TERM=xterm")
    assert (process.workdir, process.user) == ("/w", "u")
    assert creating.plan_exec(ExecOptions(("ls",), workdir="/", user="0"), main).user == "0"
    for bad in (ExecOptions(()), ExecOptions(("ls",), env=("X",)), ExecOptions(("ls",), workdir="x")):
        with pytest.raises(UsageError):
            creating.plan_exec(bad, main)


@pytest.mark.parametrize("name", ["", "-x", ".x", "a b", "a/b", "ä", "x" * 64])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_generated_names_are_valid_and_end_with_a_number_on_a_crowded_host() -> None:
    for attempt in range(200):
        assert check_name(generate_name(attempt))
    assert generate_name(10)[-1].isdigit()


def test_updates_are_planned_and_described() -> None:
    before = _plan(_Config(command=("x",)))
    after = plan_update(before, UpdateOptions(memory_bytes=64 << 20, restart=Restart("always"))).spec
    assert after.limits.memory_bytes == 64 << 20
    assert describe(before, after, alive=True) == [
        "memory limit: none -> 64MiB (now)",
        "restart policy: no -> always (now)",
    ]
    with pytest.raises(UsageError):
        plan_update(before, UpdateOptions(memory_bytes=1))
