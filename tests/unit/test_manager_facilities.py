"""What `nagaya doctor` finds of the host's kernel and programs, for hosts that have it and hosts that do not."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya.engines.vm import agent, passt, shares
from nagaya.errors import LaunchError, Unsupported
from nagaya.kernel import mount, namespaces, reflink, seccomp
from nagaya.manager import facilities
from nagaya.manager.finding import LIMITED, MISSING, OK
from nagaya.net import planning

MOUNTS = """\
21 1 254:0 / / rw - ext4 /dev/vda rw
22 21 0:5 / /dev rw - devtmpfs none rw
23 21 0:40 / /srv rw - overlay overlay rw
24 21 0:41 / /srv/with\\040space rw - tmpfs none rw
25 21 0:42 / /home rw - fuse.sshfs far rw
26 21 0:43 / /twice rw - ext4 /dev/vdb rw
27 26 0:44 / /twice rw - xfs /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/nagaya", "ext4"), ("/", "ext4"), ("/srv", "overlay"), ("/srv/a/b", "overlay"), ("/srvs", "ext4"),
        ("/srv/with space/x", "tmpfs"), ("/twice/x", "xfs"),
    ],
)  # fmt: skip
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert facilities.find_file_system(path, MOUNTS) == kind


def test_a_path_of_no_known_mount() -> None:
    assert facilities.find_file_system("/x", "") == "unknown"


def refuse(number: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("root", "status", "found"),
    [("/var/lib/nagaya", OK, "on ext4"), ("/srv/store", LIMITED, "on overlay"), ("/home/me", LIMITED, "on fuse.sshfs")],
)
def test_overlay_by_the_stores_place(monkeypatch: pytest.MonkeyPatch, root: str, status: str, found: str) -> None:
    monkeypatch.setattr(mount, "fsopen", lambda kind: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(facilities, "_read", lambda path: MOUNTS)
    finding = facilities.look_at_overlay(root)
    assert (finding.status, found in finding.found) == (status, True)
    assert ("--root" in finding.follows) == (status == LIMITED)


@pytest.mark.parametrize(
    ("number", "known", "status"),
    [(errno.ENODEV, "", MISSING), (errno.ENOSYS, "", MISSING), (errno.EPERM, "", MISSING), (errno.EPERM, "nodev\toverlay\n", OK)],
)  # fmt: skip
def test_overlay_by_the_kernel(monkeypatch: pytest.MonkeyPatch, number: int, known: str, status: str) -> None:
    monkeypatch.setattr(mount, "fsopen", refuse(number))
    monkeypatch.setattr(facilities, "_read", lambda path: known if path == "/proc/filesystems" else MOUNTS)
    finding = facilities.look_at_overlay("/var/lib/nagaya")
    assert finding.status == status
    assert ("modprobe overlay" in finding.follows) == (status == MISSING)


def test_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "unshare", lambda flags: None)
    monkeypatch.setattr(facilities, "_read", lambda path: "nagaya:200000:65536\n")
    finding = facilities.look_at_user_namespaces()
    assert (finding.status, finding.found) == (OK, "host ids from 200000 on")
    monkeypatch.setattr(namespaces, "unshare", refuse(errno.ENOSPC))
    finding = facilities.look_at_user_namespaces()
    assert (finding.status, finding.found) == (MISSING, os.strerror(errno.ENOSPC))
    assert "max_user_namespaces" in finding.follows


def test_a_trial_leaves_this_process_as_it_was_and_no_child() -> None:
    namespace, children = os.readlink("/proc/self/ns/user"), _children()
    facilities.look_at_user_namespaces()
    assert os.readlink("/proc/self/ns/user") == namespace
    assert _children() <= children  # other tests of this process may have left some


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def test_a_trial_that_breaks() -> None:
    def breaks() -> None:
        os._exit(3)

    def raises() -> None:
        raise LaunchError("nft could not load it", hint="use --network none")

    assert facilities._try(breaks) == ("the trial ended without an answer", "")
    assert facilities._try(raises) == ("nft could not load it", "use --network none")
    assert facilities._try(lambda: None) == ("", "")


def test_seccomp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facilities, "_read", lambda path: "kill_process allow\n")
    monkeypatch.setattr(seccomp, "version", lambda: "2.5.4")
    assert facilities.look_at_seccomp()[1:3] == (OK, "libseccomp 2.5.4")
    monkeypatch.setattr(seccomp, "version", refuse(errno.ENOENT))
    finding = facilities.look_at_seccomp()
    assert finding.status == MISSING and "apt install libseccomp2" in finding.follows
    monkeypatch.setattr(facilities, "_read", lambda path: "")
    finding = facilities.look_at_seccomp()
    assert finding.status == MISSING and finding.found == "this kernel has no filters"


def test_roots_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(facilities, "_make_network", lambda: None)
    assert facilities.look_at_network().status == OK

    def lacks() -> None:
        raise Unsupported("the program 'nft' is not installed", hint="apt install nftables")

    monkeypatch.setattr(facilities, "_make_network", lacks)
    finding = facilities.look_at_network()
    assert (finding.status, finding.found) == (MISSING, "the program 'nft' is not installed")
    assert finding.follows == "apt install nftables"
    monkeypatch.setattr(facilities, "_make_network", refuse(errno.EOPNOTSUPP))
    assert "--network none" in facilities.look_at_network().follows


def test_a_plain_users_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(passt, "require_passt", lambda: None)
    assert facilities.look_at_network()[1:3] == (OK, "passt")

    def lacks() -> None:
        raise Unsupported("needs passt", hint="apt-get install passt")

    monkeypatch.setattr(passt, "require_passt", lacks)
    finding = facilities.look_at_network()
    assert finding.status == LIMITED and "apt-get install passt" in finding.follows


@pytest.mark.parametrize(
    ("content", "mode", "euid", "status", "word"),
    [
        ("1\n", 0o444, 0, OK, "reach out"), ("0\n", 0o644, 0, OK, "switches it on"), ("0\n", 0o444, 0, MISSING, "sysctl"),
        ("0\n", 0o444, 1000, OK, "do without"),
    ],
)  # fmt: skip
def test_forwarding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, mode: int, euid: int, status: str, word: str
) -> None:
    path = tmp_path / "ip_forward"
    path.write_text(content)
    monkeypatch.setattr(planning, "FORWARDING", str(path))
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setattr(os, "access", lambda path, kind: bool(mode & 0o200))  # root may write what a mode forbids
    finding = facilities.look_at_forwarding()
    assert (finding.status, word in finding.follows) == (status, True)


def test_tap_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(facilities, "TUN", str(tmp_path / "tun"))
    finding = facilities.look_at_tap()
    assert (finding.status, finding.found) == (MISSING, os.strerror(errno.ENOENT)) and "modprobe tun" in finding.follows
    (tmp_path / "tun").touch()
    assert facilities.look_at_tap().status == OK


def test_the_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = os.uname().machine
    monkeypatch.setattr(agent, "agent_path", lambda name="": str(tmp_path / (name or host)))
    finding = facilities.look_at_agent()
    assert finding.status == MISSING and "make agent" in finding.follows
    (tmp_path / host).touch(0o755)
    assert facilities.look_at_agent().found == host
    other = next(name for name in ("aarch64", "riscv64") if name != host)
    (tmp_path / other).touch(0o755)
    assert facilities.look_at_agent().found == f"{host}, {other}"


def test_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f":{tmp_path}")
    (tmp_path / "mmdebstrap-for-nagaya").touch(0o644)
    assert facilities.find_program("mmdebstrap-for-nagaya") == ""
    (tmp_path / "mmdebstrap-for-nagaya").chmod(0o755)
    assert facilities.find_program("mmdebstrap-for-nagaya") == f"{tmp_path}/mmdebstrap-for-nagaya"
    for program in facilities.PROGRAMS:
        assert facilities.look_at_program(program, "/bin/it")[:3] == (program.name, OK, "/bin/it")
        finding = facilities.look_at_program(program, "")
        assert finding.status == MISSING and f"apt install {program.package}" in finding.follows


def test_vhost_is_nothing_to_miss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(facilities, "VHOST", (str(tmp_path / "net"), str(tmp_path / "vsock")))
    assert facilities.look_at_vhost()[1:3] == (MISSING, "none")
    (tmp_path / "net").touch()
    finding = facilities.look_at_vhost()
    assert finding[1:3] == (OK, str(tmp_path / "net"))
    assert finding.follows.startswith("the kernel")


def test_reflinks_are_tried_where_the_store_will_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = str(tmp_path / "not" / "there")
    for shared, status in ((True, OK), (False, LIMITED)):
        monkeypatch.setattr(reflink, "clone", lambda source, target, shared=shared: shared)
        assert facilities.look_at_reflinks(store).status == status
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/proc")
    monkeypatch.setattr(os.path, "realpath", lambda path: "/proc/x")
    assert facilities.look_at_reflinks(store).status == LIMITED  # where no file can be made


def test_everything_is_looked_at_once(tmp_path: Path) -> None:
    found = facilities.look_at_facilities(str(tmp_path / "not" / "there"))
    topics = [finding.topic for finding in found]
    assert len(set(topics)) == len(topics) and "virtiofsd" in topics
    for finding in found:
        assert finding.status in (OK, LIMITED, MISSING) and all(finding), finding
    assert shares.find_program() in (next(finding.found for finding in found if finding.topic == "virtiofsd"), "")


CHAINS = """table inet nagaya0 {
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
}
table ip filter {
	chain INPUT {
		type filter hook input priority filter; policy drop;
	}
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
	}
}
table inet firewalld {
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
	}
}
"""


def test_a_foreign_firewall_that_drops_is_named() -> None:
    assert facilities.find_dropping_chains(CHAINS) == ["ip filter FORWARD"]
    assert facilities.find_dropping_chains("") == []
