"""PCI devices of the host, as sysfs shows them: which can be handed over, and what is said of the others."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from nagaya.engines.qemu import host_pci
from nagaya.engines.qemu.host_pci import PciDevice, find_pci, parse_address
from nagaya.errors import Conflict, HostError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.kernel.capabilities import Sets, mask

PINNED = 1 << 20
CARD, SOUND, BRIDGE = "0000:01:00.0", "0000:01:00.1", "0000:00:01.0"


class Sysfs:
    """A tree like that of the kernel: /sys/bus/pci/devices, /sys/kernel/iommu_groups, /dev/vfio."""

    def __init__(self, place: Path) -> None:
        self.devices, self.groups, self.nodes = place / "devices", place / "groups", place / "vfio"
        self.drivers = place / "drivers"
        for path in (self.devices, self.groups, self.nodes, self.drivers):
            path.mkdir()

    def add(self, address: str, *, group: str = "", driver: str = "") -> None:
        device = self.devices / address
        device.mkdir()
        if group:
            (self.groups / group / "devices").mkdir(parents=True, exist_ok=True)
            (self.groups / group / "devices" / address).symlink_to(device)
            (device / "iommu_group").symlink_to(self.groups / group)
        self.bind(address, driver)

    def bind(self, address: str, driver: str) -> None:
        link = self.devices / address / "driver"
        link.unlink(missing_ok=True)
        if driver:
            (self.drivers / driver).mkdir(exist_ok=True)
            link.symlink_to(self.drivers / driver)

    def add_nodes(self, *names: str) -> None:
        for name in names:
            (self.nodes / name).touch(mode=0o600)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    tree = Sysfs(tmp_path)
    monkeypatch.setattr(host_pci, "DEVICES", str(tree.devices))
    monkeypatch.setattr(host_pci, "GROUPS", str(tree.groups))
    monkeypatch.setattr(host_pci, "NODES", str(tree.nodes))
    return tree


def refused(*texts: str) -> NagayaError:
    with pytest.raises(NagayaError) as caught:
        find_pci(texts)
    assert caught.value.message and not caught.value.message.endswith(".") and caught.value.hint
    return caught.value


@pytest.mark.parametrize("text", ["card", "1:2:3", "01:00", "0000:01:00", "01:00.0.0", "", "g1:00.0", "00001:00.0"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="PCI address"):
        parse_address(text)


def test_addresses_get_their_domain() -> None:
    assert parse_address("01:00.0") == CARD and parse_address("000A:1F:00.7") == "000a:1f:00.7"


def test_a_device_that_is_ready(sysfs: Sysfs) -> None:
    sysfs.add(BRIDGE, group="7", driver="pcieport")
    sysfs.add(CARD, group="7", driver="vfio-pci")
    sysfs.add(SOUND, group="7")
    sysfs.add_nodes("vfio", "7")
    assert find_pci(("01:00.0",)) == (PciDevice(CARD, "7"),)
    sysfs.bind(SOUND, "vfio-pci")
    assert find_pci((CARD, SOUND)) == (PciDevice(CARD, "7"), PciDevice(SOUND, "7"))
    assert find_pci(()) == ()
    with pytest.raises(UsageError, match="twice"):
        find_pci((CARD, "01:00.0"))


def test_each_refusal_says_what_is_missing(sysfs: Sysfs) -> None:
    """In the order in which somebody who sets his host up comes across them."""
    sysfs.add(CARD, driver="e1000e")
    said = refused(CARD)
    assert isinstance(said, Unsupported) and "no IOMMU" in said.message and "intel_iommu=on" in said.hint
    sysfs.add(BRIDGE, group="1", driver="pcieport")
    assert isinstance(refused("fe:1f.7"), NotFound)
    assert "behind no IOMMU" in refused(CARD).message
    (sysfs.devices / CARD / "iommu_group").symlink_to(sysfs.groups / "1")
    (sysfs.groups / "1" / "devices" / CARD).symlink_to(sysfs.devices / CARD)
    said = refused(CARD)
    assert isinstance(said, Conflict) and "driver 'e1000e' has it" in said.message
    assert "driver_override" in said.hint and f"{CARD}/driver/unbind" in said.hint
    sysfs.bind(CARD, "")
    assert "not bound to vfio-pci" in refused(CARD).message and "unbind" not in refused(CARD).hint
    sysfs.bind(CARD, "vfio-pci")
    sysfs.add(SOUND, group="1", driver="snd_hda_intel")
    said = refused(CARD)
    assert isinstance(said, Conflict) and f"IOMMU group 1 with {SOUND}" in said.message and SOUND in said.hint
    sysfs.bind(SOUND, "vfio-pci")
    said = refused(CARD)
    assert f"no {sysfs.nodes}/vfio" in said.message and "modprobe vfio-pci" in said.hint
    sysfs.add_nodes("vfio", "noiommu-1")
    assert f"no {sysfs.nodes}/1" in refused(CARD).message
    sysfs.add_nodes("1")
    assert find_pci((CARD,)) == (PciDevice(CARD, "1"),)


def test_a_plain_user_needs_the_nodes_and_the_right_to_pin(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs.add(CARD, group="3", driver="vfio-pci")
    sysfs.add_nodes("vfio", "3")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("/3"))
    assert f"may not open {sysfs.nodes}/3" in refused(CARD).message
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    limit = 1 << 30
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(host_pci, "get_sets", lambda: Sets(0, 0, 0))
    with pytest.raises(Unsupported, match="pin so much") as caught:
        host_pci.check_pinning(512 << 20)
    assert "memlock" in caught.value.hint
    limit = resource.RLIM_INFINITY
    host_pci.check_pinning(64 << 30)
    limit = 1 << 30
    monkeypatch.setattr(host_pci, "get_sets", lambda: Sets(mask(("SYS_RESOURCE",)), 0, 0))
    host_pci.check_pinning(64 << 30)


def test_one_that_another_machine_has(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs.add_nodes("3")
    host_pci.take((PciDevice(CARD, "3"), PciDevice(SOUND, "3")))
    with pytest.raises(HostError):
        host_pci.take((PciDevice(CARD, "4"),))

    def busy(path: str, flags: int) -> int:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(Conflict, match="IOMMU group 3 is in use"):
        host_pci.take((PciDevice(CARD, "3"),))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_qemu_has_nodes_of_its_own(sysfs: Sysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child: nobody else sees them, they are its user's, and the host's stay as they are."""
    for place in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        place.chmod(0o755)  # where every user gets to
    for name in ("vfio", "3", "4"):
        os.mknod(sysfs.nodes / name, 0o20600, os.stat("/dev/null").st_rdev)
    before = {name: os.stat(sysfs.nodes / name) for name in ("vfio", "3", "4")}
    monkeypatch.setattr(host_pci, "PINNED_BESIDE_BYTES", PINNED)  # more than the usual limit takes CAP_SYS_RESOURCE
    most = 2 * PINNED
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            host_pci.show_nodes((PciDevice(CARD, "3"),), 12345, memory_bytes=PINNED)
            os.setresuid(12345, 12345, 12345)
            for name in ("vfio", "3"):
                os.close(os.open(sysfs.nodes / name, os.O_RDWR))
            assert sorted(os.listdir(sysfs.nodes)) == ["3", "vfio"]
            assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (most, most)
            os.write(write, b"fine")
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 4)
    os.close(read)
    os.waitpid(pid, 0)
    assert said == b"fine"
    assert {name: os.stat(sysfs.nodes / name) for name in ("vfio", "3", "4")} == before
