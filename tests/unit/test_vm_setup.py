"""A virtual machine's set-up: from the boot request to SETUP's bytes, its answers, and the initramfs."""

from __future__ import annotations

import os
import re
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.engines.base import BootRequest
from nagaya.engines.vm.initramfs import DIRECTORIES, make_initramfs
from nagaya.engines.vm.setup import plan_setup
from nagaya.errors import HostError, RemoteError, UsageError
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Device, Limits, MachineSpec, Process, Security
from nagaya.net.plan import LinkPlan, NetworkPlan
from nagaya.protocol import agent, setup
from nagaya.protocol.agent import AgentLink, Hello, OutOfMemory, SetUp, SetupFailed
from nagaya.protocol.frame import Decoder, encode
from nagaya.protocol.setup import GuestMount, GuestNetwork, GuestSetup, setup_payload, with_time
from nagaya.storage.plan import DiskPlan, MountPlan

U32 = struct.Struct("<I")
POLICY = ProcessPolicy(0, True)
PLAIN = GuestSetup("m")
SPEC = MachineSpec(
    id="00" * 16, name="m", type="kvm", image="i", image_id="sha256:0", platform="linux/amd64",
    process=Process(("true",)), hostname="lodger", created_ns=0, sysctls=(("a.b", "1"),), limits=Limits(pids=9),
    security=Security(unmask=True), devices=(Device("/dev/net/tun", "/dev/net/tun"),),
)  # fmt: skip


LINK = GuestNetwork("02:00:00:00:00:2a", "10.0.0.1", 8, "", 0)
WRONG_NETWORKS = (
    (LINK._replace(mac="02:00"), "not a MAC address"),
    (LINK._replace(mac="xx"), "not a MAC address"),
    (LINK._replace(address="10.0.0"), "not an IPv4 address"),
    (LINK._replace(address="10.0.0.256"), "not an IPv4 address"),
    (LINK._replace(prefix=33), "length of an IPv4"),
    (LINK._replace(prefix6=129), "length of an IPv6"),
    (LINK._replace(name="a" * 16), "not the name"),
    (LINK._replace(name="a/b"), "not the name"),
    *(
        (LINK._replace(address6=text), "not an IPv6 address")
        for text in ("fd00", "fd00:::1", "1::2::3", "g::1", "12345::")
    ),
)


def fields(payload: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(payload):
        tag, zero, size = struct.unpack_from("<HHI", payload, at)
        assert zero == 0
        found.append((tag, payload[at + 8 : at + 8 + size]))
        at += 8 + size
    return found


# -- SETUP's bytes


def test_both_ends_have_the_same_numbers() -> None:
    text = (Path(__file__).parents[2] / "guest" / "proto.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"^\t(U[FMP]?_\w+) = (\d+),", text, re.M)}
    of = {prefix: {n[len(prefix) :]: v for n, v in numbers.items() if n.startswith(prefix)} for prefix in ("U_", "UF_")}
    assert len(of["U_"]) == 14 and of["U_"] == {name: getattr(setup, f"_{name}") for name in of["U_"]}
    assert len(of["UF_"]) == 4 and of["UF_"] == {name: getattr(setup, f"_{name}") for name in of["UF_"]}
    assert {n[3:].lower(): v for n, v in numbers.items() if n.startswith("UM_")} == setup.MOUNT_KINDS
    assert {n[3:].lower(): v for n, v in numbers.items() if n.startswith("UP_")} == setup.POWER_OFF


def test_a_payload_says_everything() -> None:
    made = setup_payload(
        GuestSetup(
            hostname="lodger",
            read_only=True,
            time_ns=1 << 60,
            entropy=b"\x01\x02",
            files=(("/etc/hosts", b"a\0b"),),
            mounts=(
                GuestMount("tmpfs", "", "/t", True, ("nosuid", "noexec"), 4096, 0o700),
                GuestMount("virtiofs", "tag/sub", "/v"),
            ),
            networks=(
                GuestNetwork("02:00:00:00:00:2a", "10.87.0.2", 16, "10.87.0.1", 1400),
                GuestNetwork("06:00:00:00:00:2a", "", 0, "", 0, "eth1", "fd00:1:2::a", 64, "fe80::1"),
            ),
            sysctls=(("net.ipv4.ip_forward", "1"),),
            unmask=True,
            power_off="port",
            devices=(("/dev/fuse", "/dev/fuse"),),
            pids=7,
            data_only=True,
            own_pids=True,
        )
    )
    assert sorted(fields(made)) == sorted(
        [
            (1, b"lodger"),
            (2, U32.pack(15)),
            (3, struct.pack("<Q", 1 << 60)),
            (4, b"\x01\x02"),
            (5, b"/etc/hosts\0a\0b"),
            (6, struct.pack("<IIIIQ", 2, 11, 0o700, 0, 4096) + b"\0/t\0"),
            (6, struct.pack("<IIIIQ", 1, 0, 0o1777, 0, 0) + b"tag/sub\0/v\0"),
            (
                7,
                bytes.fromhex("02000000002a")
                + struct.pack("<BBI", 16, 0, 1400)
                + bytes([10, 87, 0, 2, 10, 87, 0, 1])
                + bytes(32)
                + b"eth0\0",
            ),
            (
                7,
                bytes.fromhex("06000000002a")
                + struct.pack("<BBI", 0, 64, 0)
                + bytes(8)
                + bytes.fromhex("fd000001000200000000000000 00000a fe80" + "00" * 13 + "01")
                + b"eth1\0",
            ),
            (8, b"net.ipv4.ip_forward\x001\0"),
            (9, U32.pack(3)),
            (10, b"/dev/fuse\0/dev/fuse\0"),
            (11, U32.pack(7)),
        ]
    )


def test_a_plain_payload_is_short() -> None:
    assert sorted(tag for tag, _ in fields(setup_payload(PLAIN))) == [1, 2, 3, 9]


def test_the_time_can_be_told_later() -> None:
    timed = PLAIN._replace(time_ns=5, sysctls=(("a", "b"),))
    assert with_time(setup_payload(timed), 9) == setup_payload(timed._replace(time_ns=9))
    assert with_time(setup_payload(PLAIN), 9) == setup_payload(PLAIN)  # which leaves the clock alone
    assert with_time(b"", 9) == b""


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (PLAIN._replace(hostname="h" * 65), "longer than 64"),
        (PLAIN._replace(hostname="a\0b"), "NUL"),
        (PLAIN._replace(hostname="\ud800"), "cannot be encoded"),
        (PLAIN._replace(entropy=bytes(513)), "more than 512"),
        (PLAIN._replace(power_off="prayer"), "'prayer'"),
        (PLAIN._replace(files=(("etc/hosts", b""),)), "not an absolute path"),
        (PLAIN._replace(mounts=(GuestMount("bind", "a", "/b"),)), "cannot mount a 'bind'"),
        (PLAIN._replace(mounts=(GuestMount("tmpfs", "", "b"),)), "not an absolute path"),
        (PLAIN._replace(mounts=(GuestMount("tmpfs", "", "/b", options=("sync",)),)), "unknown mount option 'sync'"),
        *((PLAIN._replace(networks=(network,)), text) for network, text in WRONG_NETWORKS),
        (PLAIN._replace(sysctls=(("a\0", "1"),)), "NUL"),
        (PLAIN._replace(files=(("/f", bytes(1 << 20)),)), "too long"),
    ],
)
def test_what_the_agent_would_refuse_is_never_sent(wrong: GuestSetup, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        setup_payload(wrong)


# -- the link


def greeted(*, asked: bool = True) -> AgentLink:
    link = AgentLink()
    if asked:
        link.setup(setup_payload(PLAIN))
    assert link.receive(encode(agent.HELLO, 0, struct.pack("<II", agent.VERSION, 1))) == [Hello(agent.VERSION, 1)]
    return link


def test_setup_goes_first_and_once() -> None:
    link = AgentLink()
    link.setup(setup_payload(PLAIN._replace(time_ns=5)))
    link.spawn(Process(("true",)), POLICY)
    assert link.outgoing() == b""  # the agent is not there yet
    link.receive(encode(agent.HELLO, 0, struct.pack("<II", agent.VERSION, 1)))
    link.stamp(7)
    assert Decoder().feed(link.outgoing())[0].payload == setup_payload(PLAIN._replace(time_ns=7))
    kinds = [(frame.type, frame.channel) for frame in Decoder().feed(link.outgoing())]
    assert kinds == [(agent.SETUP, 0), (agent.SPAWN, 1)]
    with pytest.raises(ValueError, match="first frame"):
        link.setup(b"again")
    late = AgentLink()
    late.spawn(Process(("true",)), POLICY)
    with pytest.raises(ValueError, match="first frame"):
        late.setup(b"late")


def test_setup_that_somebody_else_has_sent_is_not_sent_again() -> None:
    link = AgentLink()
    link.setup(setup_payload(PLAIN), sent=True)
    link.spawn(Process(("true",)), POLICY)
    kinds = [(frame.type, frame.channel) for frame in Decoder().feed(link.outgoing())]
    assert kinds == [(agent.SPAWN, 1)]  # the agent was there when it was sent
    assert link.receive(encode(agent.HELLO, 0, struct.pack("<II", agent.VERSION, 1))) == [Hello(agent.VERSION, 1)]
    assert link.receive(encode(agent.READY, 0, bytes(4))) == [SetUp(())]


def test_the_clock_is_eight_bytes() -> None:
    link = AgentLink()
    link.set_clock(5)
    assert link.outgoing() == encode(agent.CLOCK, 0, struct.pack("<Q", 5))


def test_ready_brings_its_warnings() -> None:
    assert greeted().receive(encode(agent.READY, 0, U32.pack(0))) == [SetUp(())]
    lines = b"first\nse\x1bcond\n"
    assert greeted().receive(encode(agent.READY, 0, U32.pack(2) + lines)) == [SetUp(("first", "se?cond"))]


def test_a_failure_is_told_and_is_the_last_word() -> None:
    link = greeted()
    link.spawn(Process(("true",)), POLICY)
    assert link.receive(encode(agent.SETUP_FAILED, 0, U32.pack(22) + b"cannot\n\xff")) == [
        SetupFailed(22, "cannot?\ufffd")
    ]
    with pytest.raises(RemoteError, match="not set up"):
        link.receive(encode(agent.STARTED, 1, U32.pack(9)))


@pytest.mark.parametrize(
    "frame",
    [
        encode(agent.READY, 0, b""),
        encode(agent.READY, 1, U32.pack(0)),
        encode(agent.READY, 0, U32.pack(1)),
        encode(agent.READY, 0, U32.pack(0) + b"line\n"),
        encode(agent.READY, 0, U32.pack(1) + b"line\nrest"),
        encode(agent.READY, 0, U32.pack(65) + b"line\n" * 65),
        encode(agent.SETUP_FAILED, 0, b"abc"),
        encode(agent.READY, 0, U32.pack(0)) * 2,
        encode(agent.STARTED, 1, U32.pack(9)),
    ],
)
def test_violations(frame: bytes) -> None:
    link = greeted()
    link.spawn(Process(("true",)), POLICY)
    with pytest.raises(RemoteError, match="broke its protocol"):
        link.receive(frame)


def test_want_of_memory_is_told_once_and_after_the_set_up() -> None:
    link = greeted()
    frame = encode(agent.OUT_OF_MEMORY, 0)
    assert link.receive(encode(agent.READY, 0, U32.pack(0)) + frame) == [SetUp(()), OutOfMemory()]
    with pytest.raises(RemoteError, match="broke its protocol"):
        link.receive(frame)
    for wrong in (frame, encode(agent.READY, 0, U32.pack(0)) + encode(agent.OUT_OF_MEMORY, 0, b"x")):
        with pytest.raises(RemoteError, match="broke its protocol"):
            greeted().receive(wrong)


@pytest.mark.parametrize("kind", [agent.READY, agent.SETUP_FAILED])
def test_answers_that_nobody_asked_for(kind: int) -> None:
    with pytest.raises(RemoteError, match="unexpected frame"):
        greeted(asked=False).receive(encode(kind, 0, U32.pack(0)))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2), st.binary(max_size=40)), max_size=8))
def test_nothing_but_violations_comes_of_nonsense(frames: list[tuple[int, int, bytes]]) -> None:
    link = greeted()
    link.spawn(Process(("true",)), POLICY)
    try:
        link.receive(b"".join(encode(*frame) for frame in frames))
    except RemoteError:
        pass


# -- the plan


def request(**changes: object) -> BootRequest:
    made = BootRequest(SPEC, DiskPlan("image", "data"), (), NetworkPlan("none"), (), "/run/m")
    return made._replace(**changes)  # type: ignore[arg-type]


def plan(wanted: BootRequest, **tags: str) -> GuestSetup:
    shares = tuple((f"/{name}", share) for name, share in tags.items())
    return plan_setup(wanted, time_ns=5, entropy=b"e", power_off="acpi", virtiofs_tags=shares)


def mount(kind: str, target: str, *, read_only: bool = False, options: tuple[str, ...] = ()) -> MountPlan:
    return MountPlan(kind, "/src" if kind == "bind" else "", target, read_only, "rprivate", 4096, 0o750, options)


def test_a_plan_has_what_the_spec_asks_for() -> None:
    assert plan(request()) == GuestSetup(
        "lodger", time_ns=5, entropy=b"e", sysctls=(("a.b", "1"),), unmask=True, power_off="acpi",
        devices=(("/dev/net/tun", "/dev/net/tun"),), pids=9,
    )  # fmt: skip
    assert plan(request(rootfs=DiskPlan("image", "data", read_only=True))).read_only
    assert plan(request(spec=SPEC._replace(read_only=True))).read_only
    assert plan(request(spec=SPEC._replace(init=False))).own_pids


def test_mounts_become_the_guests() -> None:
    made = plan(
        request(mounts=(mount("tmpfs", "/t"), mount("tmpfs", "/x", options=("exec", "dev", "ro")),
                        mount("bind", "/a", read_only=True, options=("nosuid", "z")), mount("bind", "/copied"))),
        a="share/0",
    )  # fmt: skip
    assert made.mounts == (
        GuestMount("tmpfs", "", "/t", False, ("nosuid", "nodev", "noexec"), 4096, 0o750),
        GuestMount("tmpfs", "", "/x", True, ("nosuid",), 4096, 0o750),
        GuestMount("virtiofs", "share/0", "/a", True, ("nosuid",), 4096, 0o750),
    )  # and /copied, which has no share, comes in another way


def test_a_mount_over_proc_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing can be mounted"):
        plan(request(mounts=(mount("tmpfs", "/proc/sys"),)))


def test_the_network() -> None:
    first = LinkPlan(address="10.87.0.2", prefix=16, gateway="10.87.0.1", mac="02:00:00:00:00:01", mtu=1450)
    second = LinkPlan(name="eth1", mac="06:00:00:00:00:01", address6="fd00::2", prefix6=64, gateway6="fd00::1")
    assert plan(request(network=NetworkPlan("links", (first, second)))).networks == (
        GuestNetwork("02:00:00:00:00:01", "10.87.0.2", 16, "10.87.0.1", 1450),
        GuestNetwork("06:00:00:00:00:01", "", 0, "", 1500, "eth1", "fd00::2", 64, "fd00::1"),
    )


def test_files_of_etc_are_read_unless_the_user_covers_them(tmp_path: Path) -> None:
    for name in ("hosts", "hostname"):
        (tmp_path / name).write_text(name)
    etc = tuple((f"/etc/{name}", str(tmp_path / name)) for name in ("hosts", "hostname"))
    assert plan(request(etc=etc)).files == (("/etc/hosts", b"hosts"), ("/etc/hostname", b"hostname"))
    assert plan(request(etc=etc, mounts=(mount("bind", "/etc/hosts"),))).files == (("/etc/hostname", b"hostname"),)
    with pytest.raises(HostError):
        plan(request(etc=(("/etc/hosts", str(tmp_path / "nothing")),)))


# -- the initramfs


def unpack(archive: bytes) -> dict[str, tuple[int, tuple[int, int], bytes]]:
    """Each entry's mode, device and content."""
    found: dict[str, tuple[int, tuple[int, int], bytes]] = {}
    at = 0
    while "TRAILER!!!" not in found:
        assert archive[at : at + 6] == b"070701" and at % 4 == 0
        numbers = [int(archive[at + 6 + i * 8 : at + 14 + i * 8], 16) for i in range(13)]
        assert numbers[5] == 0  # the time
        name_end = at + 110 + numbers[11]
        name = archive[at + 110 : name_end - 1].decode()
        data = name_end + -name_end % 4
        found[name] = (numbers[1], (numbers[9], numbers[10]), archive[data : data + numbers[6]])
        at = data + numbers[6]
        at += -at % 4
    assert at == len(archive)
    return found


def test_an_initramfs_is_the_agent_and_its_directories(tmp_path: Path) -> None:
    program = tmp_path / "agent"
    program.write_bytes(os.urandom(4001))
    archive = make_initramfs(str(program))
    entries = unpack(archive)
    assert entries["init"] == (stat.S_IFREG | 0o755, (0, 0), program.read_bytes())
    assert entries["dev/console"][:2] == (stat.S_IFCHR | 0o600, (5, 1))
    assert set(entries) == {*DIRECTORIES, "init", "dev/console", "TRAILER!!!"}
    with_modules = unpack(make_initramfs(str(program), modules=(("b.ko", b"first"), ("a.ko", b"second"))))
    added = [(name, entry[2]) for name, entry in with_modules.items() if name not in entries]
    assert added == [("modules", b""), ("modules/000-b.ko", b"first"), ("modules/001-a.ko", b"second")]
    assert list(entries).index("dev") < list(entries).index("dev/console")
    assert make_initramfs(str(program)) == archive


def test_a_missing_agent(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot read the guest agent"):
        make_initramfs(str(tmp_path / "nothing"))
