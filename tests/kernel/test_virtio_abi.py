"""Numbers and layouts of virtio against the kernel's headers, as the compiler reads them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from nagaya.virtio import blk, device, mmio, queue
from nagaya.virtio.blk import Blk

HEADERS = """
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
"""

SAME_REGISTERS = (
    "MAGIC_VALUE", "DEVICE_ID", "VENDOR_ID", "DEVICE_FEATURES", "DEVICE_FEATURES_SEL", "DRIVER_FEATURES",
    "DRIVER_FEATURES_SEL", "QUEUE_SEL", "QUEUE_NUM_MAX", "QUEUE_NUM", "QUEUE_READY", "QUEUE_NOTIFY", "INTERRUPT_STATUS",
    "INTERRUPT_ACK", "STATUS", "QUEUE_DESC_LOW", "QUEUE_DESC_HIGH", "SHM_SEL", "SHM_LEN_LOW", "SHM_LEN_HIGH",
    "SHM_BASE_LOW", "SHM_BASE_HIGH", "CONFIG_GENERATION", "CONFIG",
)  # fmt: skip
SAME_BLK = (
    "F_SEG_MAX", "F_RO", "F_BLK_SIZE", "F_TOPOLOGY", "F_MQ", "F_FLUSH", "F_DISCARD", "F_WRITE_ZEROES", "T_IN", "T_OUT",
    "T_FLUSH", "T_GET_ID", "T_DISCARD", "T_WRITE_ZEROES", "S_OK", "S_IOERR", "S_UNSUPP", "ID_BYTES",
)  # fmt: skip

# What we say -> what the header calls it.
EXPECTED: dict[str, int] = {f"VIRTIO_MMIO_{name}": getattr(mmio, name) for name in SAME_REGISTERS}
EXPECTED |= {
    "VIRTIO_MMIO_VERSION": mmio.DEVICE_VERSION,
    "VIRTIO_MMIO_QUEUE_AVAIL_LOW": mmio.QUEUE_DRIVER_LOW,
    "VIRTIO_MMIO_QUEUE_AVAIL_HIGH": mmio.QUEUE_DRIVER_HIGH,
    "VIRTIO_MMIO_QUEUE_USED_LOW": mmio.QUEUE_DEVICE_LOW,
    "VIRTIO_MMIO_QUEUE_USED_HIGH": mmio.QUEUE_DEVICE_HIGH,
    "VIRTIO_MMIO_INT_VRING": mmio.USED_BUFFER,
    "VIRTIO_MMIO_INT_CONFIG": mmio.CONFIG_CHANGE,
    "VIRTIO_CONFIG_S_ACKNOWLEDGE": mmio.ACKNOWLEDGE,
    "VIRTIO_CONFIG_S_DRIVER": mmio.DRIVER,
    "VIRTIO_CONFIG_S_DRIVER_OK": mmio.DRIVER_OK,
    "VIRTIO_CONFIG_S_FEATURES_OK": mmio.FEATURES_OK,
    "VIRTIO_CONFIG_S_NEEDS_RESET": mmio.DEVICE_NEEDS_RESET,
    "VIRTIO_CONFIG_S_FAILED": mmio.FAILED,
    "1ULL << VIRTIO_F_VERSION_1": device.VERSION_1,
    "1ULL << VIRTIO_RING_F_EVENT_IDX": device.RING_EVENT_IDX,
    "1ULL << VIRTIO_RING_F_INDIRECT_DESC": device.RING_INDIRECT_DESC,
    "VIRTIO_ID_NET": device.NET,
    "VIRTIO_ID_BLOCK": device.BLOCK,
    "VIRTIO_ID_CONSOLE": device.CONSOLE,
    "VIRTIO_ID_RNG": device.ENTROPY,
    "VIRTIO_ID_BALLOON": device.BALLOON,
    "VIRTIO_ID_VSOCK": device.VSOCK,
    "VIRTIO_ID_FS": device.FILE_SYSTEM,
    "VRING_DESC_F_NEXT": queue.DESC_F_NEXT,
    "VRING_DESC_F_WRITE": queue.DESC_F_WRITE,
    "VRING_DESC_F_INDIRECT": queue.DESC_F_INDIRECT,
    "VRING_AVAIL_F_NO_INTERRUPT": queue.AVAIL_F_NO_INTERRUPT,
    "VRING_USED_F_NO_NOTIFY": queue.USED_F_NO_NOTIFY,
    "sizeof(struct vring_desc)": 16,
    "offsetof(struct vring_used, ring)": 4,
    "sizeof(struct vring_used_elem)": 8,
    "sizeof(struct virtio_blk_outhdr)": 16,
    "sizeof(struct virtio_blk_discard_write_zeroes)": 16,
}
for _name in SAME_BLK:
    _number = f"VIRTIO_BLK_{_name}"
    EXPECTED[f"1ULL << {_number}" if _name.startswith("F_") else _number] = getattr(blk, _name)

CONFIG_FIELDS = (
    "capacity", "size_max", "seg_max", "geometry.cylinders", "geometry.heads", "geometry.sectors", "blk_size",
    "physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size", "num_queues", "max_discard_sectors",
    "max_discard_seg", "discard_sector_alignment", "max_write_zeroes_sectors", "max_write_zeroes_seg",
    "write_zeroes_may_unmap",
)  # fmt: skip


def run(directory: Path, body: str, data: bytes = b"") -> list[int]:
    """What a program with this main prints, as numbers."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source, program = directory / "abi.c", directory / "abi"
    source.write_text(HEADERS + "int main(void) {\n" + body + "return 0; }\n")
    subprocess.run(["gcc", "-o", str(program), str(source)], check=True, timeout=30)
    return [int(line) for line in subprocess.check_output([str(program)], input=data, timeout=10).split()]


def test_numbers(tmp_path: Path) -> None:
    body = "".join(f'printf("%llu\\n", (unsigned long long)({name}));\n' for name in EXPECTED)
    assert dict(zip(EXPECTED, run(tmp_path, body), strict=True)) == EXPECTED


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("queues", [1, 4])
def test_a_disks_configuration(tmp_path: Path, read_only: bool, queues: int) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(3 << 40)  # more sectors than 32 bits count
    disk = Blk("blk0", str(path), read_only=read_only, queues=queues)
    try:
        size_bytes = run(tmp_path, 'printf("%zu", offsetof(struct virtio_blk_config, unused1) + 3);')[0]
        data = disk.read_config(0, 0x100)
        assert len(data) == size_bytes
        body = "struct virtio_blk_config c; memset(&c, 0, sizeof c);\n"
        body += f"if (fread(&c, {size_bytes}, 1, stdin) != 1) return 1;\n"
        body += "".join(f'printf("%llu\\n", (unsigned long long)c.{name});\n' for name in CONFIG_FIELDS)
        found = dict(zip(CONFIG_FIELDS, run(tmp_path, body, data), strict=True))
    finally:
        disk.close()
    block_sectors = path.stat().st_blksize // 512
    ranges = (0, 0) if read_only else (1 << 22, 32)
    assert found == {
        "capacity": (3 << 40) // 512, "size_max": 0, "seg_max": 254, "geometry.cylinders": 0, "geometry.heads": 0,
        "geometry.sectors": 0, "blk_size": 512, "physical_block_exp": block_sectors.bit_length() - 1,
        "alignment_offset": 0, "min_io_size": block_sectors, "opt_io_size": 0, "num_queues": queues,
        "max_discard_sectors": ranges[0], "max_discard_seg": ranges[1], "discard_sector_alignment": block_sectors,
        "max_write_zeroes_sectors": ranges[0], "max_write_zeroes_seg": ranges[1], "write_zeroes_may_unmap": 1,
    }  # fmt: skip


def test_a_configuration_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512 * 5))
    disk = Blk("blk0", str(path))
    try:
        whole = disk.read_config(0, 0x100)
        for size in (1, 2, 4, 8):
            assert b"".join(disk.read_config(at, size) for at in range(0, len(whole), size)) == whole
        assert struct.unpack_from("<Q", whole) == (5,)
        assert disk.read_config(len(whole), 4) == b""
    finally:
        disk.close()
