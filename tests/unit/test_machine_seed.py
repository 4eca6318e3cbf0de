"""First boots: what cloud-init is told, what a partition table looks like, what QEMU says of ports."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
import zlib
from pathlib import Path

import pytest

from nagaya.engines.qemu.measures import forwarded_port
from nagaya.engines.qemu.screen import parse_keys
from nagaya.errors import NotFound, UsageError
from nagaya.manager.building import CLOUD_CONFIG
from nagaya.storage.disk_images.assemble import find_kernel, plan_table
from nagaya.storage.disk_images.seed import DEFAULT_USER_DATA, SeedLink, network_config, vendor_data


def test_networks_by_dhcp_and_with_addresses_of_ours() -> None:
    links = (
        SeedLink("eth0", "02:00:00:00:00:01"),
        SeedLink("eth1", "02:00:00:00:00:02", ("10.87.0.2/24", "fd00::2/64"), ("10.87.0.1", "fd00::1")),
    )
    config = json.loads(network_config(links, ("10.87.0.1",), ("lan",)))["config"]
    assert config[0]["subnets"] == [{"type": "dhcp4"}]
    assert config[1]["subnets"] == [
        {"type": "static", "address": "10.87.0.2/24", "gateway": "10.87.0.1"},
        {"type": "static6", "address": "fd00::2/64", "gateway": "fd00::1"},
    ]
    assert config[2] == {"type": "nameserver", "address": ["10.87.0.1"], "search": ["lan"]}
    assert json.loads(network_config((), (), ())) == {"version": 1, "config": []}


def test_what_cloud_init_is_told_fits_its_schema(tmp_path: Path) -> None:
    """All of it together is what cloud-init checks, and warns of at each boot."""
    if shutil.which("cloud-init") is None:
        pytest.skip("cloud-init brings its schema, and would set this host up when it is installed")
    archive = json.loads(vendor_data("0" * 32).partition("\n")[2])
    texts = [DEFAULT_USER_DATA, CLOUD_CONFIG, *(part["content"] for part in archive if "config" in part["type"])]
    for text in texts:
        (tmp_path / "config").write_text(f"#cloud-config\n{text.removeprefix('#cloud-config')}")
        done = subprocess.run(
            ["cloud-init", "schema", "--config-file", tmp_path / "config"], capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith("Valid"), (text, done)


def test_a_partition_table_is_whole() -> None:
    root = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    own = str(uuid.UUID(int=7))
    first, last = plan_table(100_000, ((2048, 4096, root, own),), str(uuid.UUID(int=9)))
    assert len(first) == 34 * 512 and len(last) == 33 * 512
    assert first[510:512] == b"\x55\xaa" and first[450] == 0xEE
    for header, entries, here in ((first[512:1024], first[1024:], 1), (last[-512:], last[:-512], 99_999)):
        assert header[:8] == b"EFI PART" and int.from_bytes(header[24:32], "little") == here
        bare = header[:16] + bytes(4) + header[20:92]
        assert int.from_bytes(header[16:20], "little") == zlib.crc32(bare)
        assert int.from_bytes(header[88:92], "little") == zlib.crc32(entries)
        assert entries[:16] == uuid.UUID(root).bytes_le and entries[16:32] == uuid.UUID(own).bytes_le
        assert [int.from_bytes(entries[at : at + 8], "little") for at in (32, 40)] == [2048, 2048 + 4096 - 1]


def test_the_newest_kernel_that_has_an_initramfs(tmp_path: Path) -> None:
    boot = tmp_path / "boot"
    with pytest.raises(NotFound):
        find_kernel(str(tmp_path))
    boot.mkdir()
    for name in ("vmlinuz-6.1.0-1", "initrd.img-6.1.0-1", "vmlinuz-6.1.0-2"):
        (boot / name).touch()
    assert find_kernel(str(tmp_path)) == ("vmlinuz-6.1.0-1", "initrd.img-6.1.0-1")
    for name in ("vmlinux-6.12.1+deb13-riscv64", "initrd.img-6.12.1+deb13-riscv64"):
        (tmp_path / "boot" / name).touch()
    (tmp_path / "boot/vmlinuz-6.1.0-1").unlink()
    assert find_kernel(str(tmp_path)) == ("vmlinux-6.12.1+deb13-riscv64", "initrd.img-6.12.1+deb13-riscv64")


def test_ports_that_qemu_forwards() -> None:
    said = (
        "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
        "  TCP[HOST_FORWARD]  12       127.0.0.1 40935       10.0.2.15    22     0     0\r\n"
    )
    assert forwarded_port(said) == 40935
    for wrong in ("", None, {}, "TCP[HOST_FORWARD] 1 2", "TCP[HOST_FORWARD] 12 127.0.0.1 x 10.0.2.15 22"):
        assert forwarded_port(wrong) == 0


def test_keys() -> None:
    assert parse_keys(("ctrl-alt-delete", "Enter", "a", "-"), "") == [
        ["ctrl", "alt", "delete"],
        ["ret"],
        ["a"],
        ["minus"],
    ]
    assert parse_keys((), "aB!\n") == [["a"], ["shift", "b"], ["shift", "1"], ["ret"]]
    for words, text in ((("a--b",), ""), (("ctrl-ü",), ""), ((), "é"), ((), "a" * 2000)):
        with pytest.raises(UsageError):
            parse_keys(words, text)


def test_a_clone_gets_an_id_of_its_own(tmp_path: Path) -> None:
    mark, _, archive = vendor_data("0123456789abcdef" * 2).partition("\n")
    parts = {part["type"]: part["content"] for part in json.loads(archive)}
    assert mark == "#cloud-config-archive" and parts["text/cloud-config"].startswith("#cloud-config\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "dbus").mkdir()
    own, dbus = tmp_path / "etc/machine-id", tmp_path / "dbus/machine-id"
    script = (
        parts["text/cloud-boothook"].replace("/etc/", f"{tmp_path}/etc/").replace("/var/lib/dbus/", f"{tmp_path}/dbus/")
    )
    for before in ("", "f" * 32 + "\n"):
        own.write_text(before)
        dbus.unlink(missing_ok=True)
        dbus.symlink_to(own)
        subprocess.run(["sh", "-e", "-c", script], check=True)
        assert own.read_text() == "0123456789abcdef" * 2 + "\n" and dbus.is_symlink()
