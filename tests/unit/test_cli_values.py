"""What users write as values, and what they are told when it is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya.cli import values
from nagaya.errors import NotFound, UsageError
from nagaya.model.spec import Device, LogLimits, Mount, Restart, Security, Ulimit

NOW = 1_795_440_000_000_000_000


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("4096", 4096), ("512m", 512 << 20), ("1g", 1 << 30), ("1G", 1 << 30), ("64kb", 64 << 10),
        ("1.5GiB", 3 << 29), ("1 gb", 1 << 30), ("100B", 100), (".5k", 512), ("2t", 2 << 40),
    ],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert values.parse_size(text, "--memory") == count


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10), ("0", 0), ("1.5", 1.5), ("500ms", 0.5), ("1m30s", 90), ("2h", 7200), ("1h1m1s", 3661), ("1d", 86400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert values.parse_duration(text, "-t") == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1795440000", NOW),
        ("1795440000.25", NOW + 250_000_000),
        ("1795440000.123456789", NOW + 123_456_789),
        ("10m", NOW - 600 * 10**9),
        ("1h30m", NOW - 5400 * 10**9),
        ("2026-11-23T13:20:00Z", 1_795_440_000_000_000_000),
        ("2026-11-23T14:20:00+01:00", 1_795_440_000_000_000_000),
        ("2026-11-23T13:20:00.123456789Z", 1_795_440_000_123_456_789),
        ("2026-11-23 13:20:00Z", 1_795_440_000_000_000_000),
    ],
)
def test_times(text: str, time_ns: int) -> None:
    assert values.parse_time(text, "--since", now_ns=NOW) == time_ns


def test_a_time_without_a_zone_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    try:
        assert values.parse_time("2026-11-23T22:20:00", "--since", now_ns=NOW) == NOW
        assert values.parse_time("2026-11-24", "--since", now_ns=NOW) == NOW + 6000 * 10**9
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "milli"), [("1.5", 1500), ("0", 0), ("2", 2000), ("0.001", 1), (".5", 500), ("0.0015", 2)]
)
def test_cpus(text: str, milli: int) -> None:
    assert values.parse_cpus(text) == milli


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("KILL", 9),
        ("SIGKILL", 9),
        ("kill", 9),
        ("sigterm", 15),
        ("9", 9),
        ("RTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert values.parse_signal(text) == number


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("ctrl-p,ctrl-q", b"\x10\x11"), ("", b""), ("a,ctrl-A", b"a\x01"), ("ctrl-@", b"\0"), ("ctrl-[", b"\x1b"),
        ("ctrl-\\", b"\x1c"), ("ctrl-_", b"\x1f"),
    ],
)  # fmt: skip
def test_detach_keys(text: str, keys: bytes) -> None:
    assert values.parse_detach_keys(text) == keys


HERE = os.getcwd()


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/srv:/data", Mount("bind", "/srv", "/data")),
        ("/srv/:/data:ro", Mount("bind", "/srv", "/data", True)),
        ("./x:/data", Mount("bind", f"{HERE}/x", "/data")),
        (".:/data", Mount("bind", HERE, "/data")),
        ("~/x:/data", Mount("bind", os.path.expanduser("~/x"), "/data")),
        ("/srv:/data:ro,rslave,noexec", Mount("bind", "/srv", "/data", True, "rslave", options=("noexec",))),
        ("/srv:/data:z", Mount("bind", "/srv", "/data")),
        ("/srv:/data:rw,cached", Mount("bind", "/srv", "/data")),
        ("data:/data", Mount("volume", "data", "/data")),
        ("data:/data:nocopy", Mount("volume", "data", "/data", options=("nocopy",))),
        ("/data", Mount("volume", "", "/data", anonymous=True)),
    ],
)
def test_volumes(text: str, mount: Mount) -> None:
    assert values.parse_volume(text) == mount


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/run", Mount("tmpfs", "", "/run")),
        ("/run:size=64m,mode=755,exec", Mount("tmpfs", "", "/run", size_bytes=64 << 20, mode=0o755, options=("exec",))),
        ("/run:ro", Mount("tmpfs", "", "/run", read_only=True)),
    ],
)
def test_tmpfs(text: str, mount: Mount) -> None:
    assert values.parse_tmpfs(text) == mount


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("type=bind,source=/srv,target=/data", Mount("bind", "/srv", "/data")),
        ("type=bind,src=/srv,dst=/data,readonly", Mount("bind", "/srv", "/data", True)),
        ("type=bind,src=/srv,destination=/data,ro=true", Mount("bind", "/srv", "/data", True)),
        ("type=bind,src=/srv,dst=/data,readonly=false", Mount("bind", "/srv", "/data")),
        ("type=bind,src=/srv,dst=/d,bind-propagation=shared", Mount("bind", "/srv", "/d", False, "shared")),
        ("source=data,target=/data", Mount("volume", "data", "/data")),
        ("type=volume,target=/data", Mount("volume", "", "/data", anonymous=True)),
        ("type=volume,src=d,dst=/d,volume-nocopy", Mount("volume", "d", "/d", options=("nocopy",))),
        ("type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=700", Mount("tmpfs", "", "/t", size_bytes=1 << 20, mode=0o700)),
        ('type=bind,"source=/a,b",target=/data', Mount("bind", "/a,b", "/data")),
    ],
)
def test_mounts(text: str, mount: Mount) -> None:
    assert values.parse_mount(text) == mount


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("/dev/fuse", Device("/dev/fuse", "/dev/fuse")),
        ("/dev/sda:/dev/disk", Device("/dev/sda", "/dev/disk")),
        ("/dev/sda:r", Device("/dev/sda", "/dev/sda", "r")),
        ("/dev/sda:/dev/disk:rw", Device("/dev/sda", "/dev/disk", "rw")),
    ],
)
def test_devices(text: str, device: Device) -> None:
    assert values.parse_device(text) == device


@pytest.mark.parametrize(
    ("text", "ulimit"),
    [
        ("nofile=1024", Ulimit("nofile", 1024, 1024)),
        ("nofile=1024:4096", Ulimit("nofile", 1024, 4096)),
        ("core=-1", Ulimit("core", -1, -1)),
        ("memlock=1:unlimited", Ulimit("memlock", 1, -1)),
    ],
)
def test_ulimits(text: str, ulimit: Ulimit) -> None:
    assert values.parse_ulimit(text) == ulimit


@pytest.mark.parametrize(
    ("text", "restart"),
    [
        ("no", Restart()), ("always", Restart("always")), ("unless-stopped", Restart("unless-stopped")),
        ("on-failure", Restart("on-failure")), ("on-failure:3", Restart("on-failure", 3)),
    ],
)  # fmt: skip
def test_restart_policies(text: str, restart: Restart) -> None:
    assert values.parse_restart(text) == restart


@pytest.mark.parametrize(
    ("options", "security"),
    [
        ([], Security()),
        (["seccomp=unconfined"], Security(seccomp="unconfined")),
        (["seccomp:unconfined"], Security(seccomp="unconfined")),
        (["seccomp=builtin"], Security()),
        (["seccomp=/etc/p.json"], Security(seccomp="/etc/p.json")),
        (["seccomp=p.json"], Security(seccomp=f"{HERE}/p.json")),
        (["no-new-privileges"], Security()),
        (["no-new-privileges=false"], Security(no_new_privileges=False)),
        (["no-new-privileges:true"], Security()),
        (["systempaths=unconfined"], Security(unmask=True)),
        (["apparmor=unconfined", "label=disable"], Security()),
    ],
)
def test_security_options(options: list[str], security: Security) -> None:
    assert values.parse_security([], [], options) == security


def test_capabilities_are_spelled_one_way() -> None:
    security = values.parse_security(["cap_net_admin", "SYS_PTRACE"], ["all"], [])
    assert security.cap_add == ("NET_ADMIN", "SYS_PTRACE")
    assert security.cap_drop == ("ALL",)


def test_log_options() -> None:
    assert values.parse_log_options(["max-size=1m", "max-file=5"]) == LogLimits(1 << 20, 5)


def test_hosts() -> None:
    assert values.parse_hosts(["db:10.0.0.5", "six=fd00::5", "sixth:fd00::6", "b:[::1]"]) == (
        ("db", "10.0.0.5"), ("six", "fd00::5"), ("sixth", "fd00::6"), ("b", "::1"),
    )  # fmt: skip


def test_sysctls() -> None:
    assert values.parse_sysctls(["net.core.somaxconn=1", "net/ipv4/x=a=b"]) == (
        ("net.core.somaxconn", "1"), ("net.ipv4.x", "a=b"),
    )  # fmt: skip
    wanted = (("net.ipv4.conf.eth0/5.mtu", "1"),)  # /proc/sys/net/ipv4/conf/eth0.5/mtu
    assert values.parse_sysctls(["net.ipv4.conf.eth0/5.mtu=1"]) == wanted
    assert values.parse_sysctls(["net/ipv4/conf/eth0.5/mtu=1"]) == wanted


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "from here")
    monkeypatch.delenv("NOBODYS", raising=False)
    path = tmp_path / "env"
    path.write_bytes(b"\xef\xbb\xbf# a comment\r\n\n  A=1\r\nB=x # no comment\nOURS\nNOBODYS\nC=\n")
    assert values.parse_environment(["A=2", "OURS", "NOBODYS", "D=a=b"], [str(path)]) == (
        "A=1", "B=x # no comment", "OURS=from here", "C=", "A=2", "OURS=from here", "D=a=b",
    )  # fmt: skip


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text("a=1\nb=2\n")
    assert values.parse_labels(["b=3", "c"], [str(path)]) == (("a", "1"), ("b", "3"), ("c", ""))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="--env-file: there is no file"):
        values.parse_environment([], [str(tmp_path / "none")])
    with pytest.raises(UsageError, match="cannot read"):
        values.parse_labels([], [str(tmp_path)])
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        values.parse_environment([], [str(tmp_path / "binary")])


WRONG: list[tuple[Callable[[str], object], list[str]]] = [
    (lambda text: values.parse_size(text, "-m"), ["", "m", "12x", "1.2.3g", "-1", "0x10", "1g1", "١"]),
    (lambda text: values.parse_duration(text, "-t"), ["", "s", "10x", "-1", "1m30", "1..5s", "ten"]),
    (lambda text: values.parse_time(text, "--since", now_ns=NOW), ["", "yesterday", "2026-13-01", "2026-11-23T25:00Z"]),
    (values.parse_cpus, ["", "two", "-1", "0.0001", "1,5"]),
    (values.parse_pids, ["", "many", "-2", "1.5"]),
    (values.parse_cpuset, ["a", "0-", "-1", "0,,1", "0-3-5"]),
    (values.parse_weight, ["5", "1001", "x"]),
    (values.parse_signal, ["", "0", "65", "NOPE", "SIGTERM+1", "RTMIN+40", "RTMIN+x", "SIG_IGN", "-9"]),
    (values.parse_detach_keys, ["ctrl-", "ctrl-pp", "ctrl-1", "ab", ",", "é"]),
    (
        values.parse_volume,
        ["", ":", "a:", ":/b", "/a:b", "/a:/b:rq", "a/b:/c", "/a:/b:ro:z", "relative", "/a:/b:nocopy", "/a:/b:"],
    ),
    (values.parse_tmpfs, ["", "run", "/run:size=x", "/run:mode=9", "/run:mode=77777", "/run:what", "/run:size="]),
    (
        values.parse_mount,
        [
            "", "type=bind", "type=floppy,target=/x", "type=bind,target=/x", "target=x,source=a", "type=tmpfs,src=/a,dst=/b",
            "type=bind,src=/a,dst=/b,tmpfs-size=1", "type=bind,src=/a,dst=/b,bind-propagation=up", "/a:/b",
            "type=bind,src=/a,dst=/b,ro=maybe", "type=volume,src=a,dst=/b,volume-driver=x",
        ],
    ),
    (values.parse_device, ["", "fuse", "/dev/a:/b:x", "/dev/a:/b:rr", "/dev/a:/b:/c", "/a:/b:rw:r", "/dev/a:"]),
    (values.parse_ulimit, ["", "files=1", "nofile", "nofile=", "nofile=x", "nofile=2:1", "nofile=-1:5", "nofile=1:", "cpu=-2"]),
    (values.parse_restart, ["", "sometimes", "always:3", "on-failure:x", "on-failure:-1", "on-failure:"]),
    (lambda text: values.parse_security([], [], [text]), ["", "seccomp", "no-new-privileges=maybe", "apparmor=docker", "x=y"]),
    (lambda text: values.parse_log_options([text]), ["max-size", "max-size=x", "max-file=0", "mode=blocking"]),
    (lambda text: values.parse_hosts([text]), ["", "db", "db:", ":1.2.3.4", "db:1.2.3", "d b:1.2.3.4", "db:host"]),
    (lambda text: values.parse_address(text, "--dns"), ["", "1.2.3", "dns.example", "fd00::zz"]),
    (lambda text: values.parse_sysctls([text]), ["", "a", "=1", "../x=1"]),
    (lambda text: values.parse_environment([text], []), ["", "=x", "A B=1"]),
    (lambda text: values.parse_labels([text], []), ["", "=x", " =x"]),
]  # fmt: skip


@pytest.mark.parametrize(("parse", "text"), [(parse, text) for parse, texts in WRONG for text in texts])
def test_wrong_values_are_one_sentence(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.message
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")
