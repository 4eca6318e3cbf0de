"""Where things are in a machine's physical address space: constants that the loader, the tables and the devices share."""

from __future__ import annotations

from nagaya.static import NamedTuple

# Below 1 MiB, RAM: what the loader leaves for the kernel's first steps.
MP_POINTER_GPA = 0
"""Linux looks here first. Where it is told of no table, it maps and reads the BIOS area 16 bytes at a time, twice."""
GDT_GPA = 0x500
MP_TABLE_GPA = 0x600
MP_TABLE_BYTES = 0x6000
BOOT_PARAMS_GPA = 0x7000
PVH_START_INFO_GPA = 0x8000
PAGE_TABLES_GPA = 0x9000
"""PML4, PDPT and four page directories of 2 MiB pages: the first 4 GiB, one to one."""
BOOT_STACK_GPA = 0x8FF0
SETUP_DATA_GPA = 0xF000
COMMAND_LINE_GPA = 0x20000
COMMAND_LINE_BYTES = 0x10000
LOW_RAM_END_GPA = 0x9FC00
"""Where a PC's extended BIOS data area would begin: kernels expect no RAM from here to 1 MiB."""

ACPI_GPA = 0xE0000
"""The RSDP first: kernels look for it on every 16 bytes from here to 1 MiB."""
ACPI_BYTES = 0x20000
HIGH_RAM_GPA = 0x100000

# In the hole below 4 GiB (see `memory.LOW_END_GPA`).
VIRTIO_GPA = 0xD000_0000
VIRTIO_STEP = 0x1000
"""A page for each device."""
IO_APIC_GPA = 0xFEC0_0000
LOCAL_APIC_GPA = 0xFEE0_0000

# Pins of the I/O APIC. Below 16 they are the old PICs' too, for kernels that do not know more.
POWER_BUTTON_GSI = 9
"""Where a PC has its ACPI interrupt."""
_RESERVED_GSIS = {0, 1, 2, 4, 8, POWER_BUTTON_GSI, 13}
VIRTIO_GSIS = tuple(gsi for gsi in range(5, 24) if gsi not in _RESERVED_GSIS)
"""One for each device, so this is how many devices a machine can have."""


class MmioDevice(NamedTuple):
    """A virtio device on the mmio transport. Its interrupt is an edge."""

    gpa: int
    size_bytes: int
    gsi: int
