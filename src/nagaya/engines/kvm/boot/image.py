"""What every way of booting comes to, and what the two of them share."""

from __future__ import annotations

import errno
import os

from nagaya.engines.kvm import layout
from nagaya.errors import HostError, IntegrityError, UsageError
from nagaya.memory import PAGE_BYTES, GuestMemory, Region
from nagaya.static import NamedTuple, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.kvm.boot.elf import Segment

Write = tuple[int, bytes | memoryview]
"""A gpa, and what to put there."""

E820_RAM = 1
E820_RESERVED = 2
CR0_PROTECTED = 1 << 0
CR0_EXTENSION_TYPE = 1 << 4  # always set on a CPU with a built-in FPU


class SegmentRegister(NamedTuple):
    """A segment register with its hidden part. The fields are those of `kvm_segment`, in its order; `avl` is 0."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741 - the manual's name: 64-bit code
    g: int


class EntryState(NamedTuple):
    """The first vCPU's registers. What is not named is zero; `rflags` is 2: interrupts are off."""

    rip: int
    rsp: int
    rsi: int
    rbx: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    code: SegmentRegister
    data: SegmentRegister
    """For DS, ES, FS, GS and SS alike."""
    task: SegmentRegister
    """TR. The IDT and LDTR are empty: no interrupt can be taken before the kernel has its own."""
    gdt_gpa: int
    gdt_limit: int
    rax: int = 0


class BootImage(NamedTuple):
    """What to write before the first vCPU runs, and its state. Writes do not overlap; views are of the files themselves."""

    writes: tuple[Write, ...]
    state: EntryState


class Handover(NamedTuple):
    """What a kernel is given beside itself. `initrd` and `rng_seed` may be empty."""

    memory: Sequence[Region]
    command_line: str
    initrd: bytes | memoryview
    rsdp_gpa: int
    """0: the kernel has to look for it."""
    rng_seed: bytes
    """Secret bytes that nobody else has: Linux 6.0 and later mix them into their random numbers at once."""


class Span(NamedTuple):
    """A line of the map of memory that a kernel is given."""

    gpa: int
    size_bytes: int
    type: int


def write_image(image: BootImage, memory: GuestMemory) -> None:
    """Put it into memory, which is new. Raises `IntegrityError` when a file was cut short since it was looked at.

    Large parts are written to the memory's file: without a page fault for each 4 KiB it takes half the time, and where a
    mapped file has no bytes any more, that is an error and not a signal that ends this process.
    """
    for gpa, data in image.writes:
        if not isinstance(data, memoryview):
            memory.write(gpa, data)
            continue
        memory.slice(gpa, len(data))  # refuses what is not inside
        region = next(region for region in memory.regions if gpa >= region.gpa and gpa - region.gpa < region.size_bytes)
        at = region.file_offset + gpa - region.gpa
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(memory.fd, data[done:], at + done)
            except OSError as error:
                if error.errno == errno.EINVAL and not done:  # huge pages' file cannot be written to, only mapped
                    memory.write(gpa, data)
                    break
                if error.errno == errno.EFAULT:
                    raise IntegrityError("the kernel or its initial RAM disk was changed while it was read") from None
                raise HostError.from_os(error, "cannot write guest memory", hint="ask for less memory") from None


def plan_memory_map(memory: Sequence[Region]) -> tuple[Span, ...]:
    """The e820 map: RAM, and in the first megabyte what a PC keeps from the kernel. What is not named is for devices."""
    spans = [
        Span(0, layout.LOW_RAM_END_GPA, E820_RAM),
        Span(layout.LOW_RAM_END_GPA, layout.HIGH_RAM_GPA - layout.LOW_RAM_END_GPA, E820_RESERVED),
    ]
    for region in memory:
        start, end = max(region.gpa, layout.HIGH_RAM_GPA), region.gpa + region.size_bytes
        spans.append(Span(start, end - start, E820_RAM))
    return tuple(spans)


def plan_segments(segments: Sequence[Segment], content: memoryview, memory: Sequence[Region]) -> list[Write]:
    """A kernel's segments as views of its file. What follows a segment's bytes stays zero, as new memory is.

    Raises `UsageError` when one is not wholly in RAM, or where the loader's own tables are.
    """
    writes: list[Write] = []
    for segment in segments:
        end = segment.gpa + segment.memory_bytes
        if segment.gpa < layout.HIGH_RAM_GPA:
            raise UsageError(
                f"the kernel wants to be loaded at {segment.gpa:#x}, where the machine's tables are",
                hint="link it at 1 MiB or above",
            )
        if not any(region.gpa <= segment.gpa and end <= region.gpa + region.size_bytes for region in memory):
            raise UsageError(
                f"the kernel needs memory from {segment.gpa:#x} to {end:#x}, and the machine has "
                f"{sum(region.size_bytes for region in memory) >> 20} MiB",
                hint="give the machine more memory",
            )
        if segment.file_bytes:
            writes.append((segment.gpa, content[segment.offset : segment.offset + segment.file_bytes]))
    return writes


def encode_command_line(command_line: str, most_bytes: int) -> bytes:
    """The command line with the zero that ends it. Raises `UsageError` for more than the kernel's `most_bytes`."""
    data = os.fsencode(command_line)
    most_bytes = min(most_bytes, layout.COMMAND_LINE_BYTES - 1)
    if len(data) > most_bytes:
        raise UsageError(f"the kernel's command line has {len(data)} bytes; the kernel reads {most_bytes}")
    if b"\0" in data:
        raise UsageError("the kernel's command line contains a zero byte")
    return data + b"\0"


def place_initrd(size_bytes: int, *, above: int, last: int, memory: Sequence[Region]) -> int:
    """Where an initial RAM disk goes: as high as it can, so that the kernel keeps the memory after itself.

    It lies after `above` (the kernel's end), and its last byte is at `last` or below. Raises `UsageError`.
    """
    low = memory[0]
    end = min(low.gpa + low.size_bytes, last + 1)
    gpa = (end - size_bytes) // PAGE_BYTES * PAGE_BYTES
    if gpa < above:
        raise UsageError(
            f"the kernel and its initial RAM disk of {size_bytes >> 20} MiB do not fit into memory",
            hint=f"give the machine at least {(above + size_bytes + PAGE_BYTES >> 20) + 1} MiB, and some to work with",
        )
    return gpa
