"""Machines saved and gone on from, on the real /dev/kvm, with kernels of a few bytes; and what is refused."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nagaya.engines.kvm import saved, vm
from nagaya.engines.kvm.assembly import check_host
from nagaya.engines.kvm.known import PVM, find_kvm
from nagaya.engines.kvm.machine import Hardware, Machine
from nagaya.errors import Conflict, IntegrityError, NagayaError, Unsupported
from nagaya.memory import PAGE_BYTES
from nagaya.virtio.blk import Blk
from nagaya.virtio.device import Device
from nagaya.virtio.rng import Rng
from tests.kernel.test_kvm_machine import (
    COUNTER_GPA,
    EXIT_WITH_EAX,
    FLAG_GPA,
    MEMORY_BYTES,
    PATIENCE_S,
    TEXT_GPA,
    open_files,
    read_memory,
    until_equal,
)
from tests.kernel_images import Load, make_elf

# incl (COUNTER); then ends with what FLAG holds, once that is not zero.
COUNT = b"\xbb" + COUNTER_GPA.to_bytes(4, "little") + b"\x48\xff\x03"
LEAVES = until_equal(COUNT + read_memory(FLAG_GPA), 7) + EXIT_WITH_EAX


@pytest.fixture(autouse=True)
def kvm_and_nothing_left() -> Iterator[None]:
    try:
        os.close(vm.open_kvm())
    except Unsupported as error:
        pytest.skip(f"needs kvm: {error}")
    before = open_files()
    yield
    assert open_files() == before


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel"
    path.write_bytes(make_elf([Load(LEAVES, TEXT_GPA)], entry=TEXT_GPA))
    return str(path)


def hardware(kernel: str, **changes: Any) -> Hardware:
    return Hardware(kernel=kernel, memory_bytes=MEMORY_BYTES, plain=True)._replace(**changes)


def memory_of(machine: Machine) -> Any:
    parts = machine._parts
    assert parts is not None
    return parts.memory


def count_of(machine: Machine) -> int:
    return int.from_bytes(memory_of(machine).read(COUNTER_GPA, 8), "little")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def devices(disk: Path) -> tuple[Device, ...]:
    return Rng("rng0"), Blk("blk0", str(disk))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def directory(kernel: str, disk: Path, tmp_path: Path) -> Path:
    """A counting machine that was saved; its count then is in the notes."""
    place = tmp_path / "saved"
    place.mkdir()
    with Machine(hardware(kernel), devices(disk)) as machine:
        machine.start()
        wait_for(lambda: count_of(machine) > 1000)
        machine.pause()
        count = count_of(machine)
        machine.save(str(place), notes={"count": count})
        assert count_of(machine) == count
        machine.resume()
        wait_for(lambda: count_of(machine) > count)  # it goes on, and what was saved does not
    return place


def go_on(directory: Path, kernel: str, disk: Path, **options: Any) -> Machine:
    """Started; `machine.found` is closed with it."""
    found = saved.read(str(directory))
    try:
        machine = Machine(hardware(kernel), devices(disk), saved=found, **options)
        try:
            machine.start()
        except BaseException:
            machine.close()
            raise
    finally:
        found.close()
    return machine


@pytest.mark.parametrize("shared", [False, True], ids=["copy-on-write", "copied"])
def test_it_goes_on_where_it_was(directory: Path, kernel: str, disk: Path, shared: bool) -> None:
    before = json.loads((directory / "state").read_bytes().partition(b"\n")[2])["notes"]["count"]
    with go_on(directory, kernel, disk, shared=shared) as machine:
        assert memory_of(machine).private != shared
        wait_for(lambda: count_of(machine) > before + 1000)
        memory_of(machine).write(FLAG_GPA, (7).to_bytes(4, "little"))
        ending = machine.wait(PATIENCE_S)
    assert ending is not None and (ending.kind, ending.status) == ("exit", 7)


def test_machines_of_one_directory_do_not_see_each_other(directory: Path, kernel: str, tmp_path: Path) -> None:
    disks = [tmp_path / f"disk{number}" for number in range(3)]
    for path in disks:
        path.write_bytes(bytes(1 << 20))
    content = (directory / "memory").read_bytes()
    machines = [go_on(directory, kernel, path) for path in disks]
    try:
        memory_of(machines[0]).write(FLAG_GPA, (7).to_bytes(4, "little"))
        assert machines[0].wait(PATIENCE_S) is not None
        for machine in machines[1:]:
            count = count_of(machine)
            wait_for(lambda machine=machine, count=count: count_of(machine) > count)  # type: ignore[misc]
            assert machine.wait(0) is None
    finally:
        for machine in machines:
            machine.close()
    assert (directory / "memory").read_bytes() == content


def test_what_goes_on_can_be_saved_again(directory: Path, kernel: str, disk: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    with go_on(directory, kernel, disk) as machine:
        memory_of(machine).write(PAGE_BYTES * 3000, b"mine")
        memory_of(machine).discard(PAGE_BYTES * 4097, PAGE_BYTES)
        machine.pause()
        count, text = count_of(machine), memory_of(machine).read(TEXT_GPA, len(LEAVES))
        machine.save(str(again))
    found = saved.read(str(again))
    memory = found.map_memory(shared=False)
    try:
        assert memory.read(PAGE_BYTES * 3000, 4) == b"mine"
        assert memory.read(TEXT_GPA, len(LEAVES)) == text == LEAVES
        assert int.from_bytes(memory.read(COUNTER_GPA, 8), "little") == count
    finally:
        memory.close()
        found.close()
    with go_on(again, kernel, disk) as machine:
        wait_for(lambda: count_of(machine) > count)


def test_only_a_paused_machine_is_saved(kernel: str, disk: Path, tmp_path: Path) -> None:
    with Machine(hardware(kernel), devices(disk)) as machine:
        machine.start()
        with pytest.raises(Conflict):
            machine.save(str(tmp_path))
    assert not (tmp_path / "state").exists()


def test_pages_of_zeros_take_no_room(directory: Path) -> None:
    status = (directory / "memory").stat()
    assert status.st_size == MEMORY_BYTES and status.st_blocks * 512 < 1 << 20


# -- refused


def rewrite(directory: Path, **changes: Any) -> None:
    """The state with other parts, and a sum that is right."""
    state = json.loads((directory / "state").read_bytes().partition(b"\n")[2])
    body = json.dumps({**state, **changes}).encode()
    head = f"nagaya-saved {saved.FORMAT} {len(body)} {zlib.crc32(body):08x}\n".encode()
    (directory / "state").write_bytes(head + body)


def cut_state(directory: Path) -> None:
    data = (directory / "state").read_bytes()
    (directory / "state").write_bytes(data[: len(data) // 2])


def flip_state(directory: Path) -> None:
    data = bytearray((directory / "state").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "state").write_bytes(data)


def raise_format(directory: Path) -> None:
    data = (directory / "state").read_bytes()
    old = f"nagaya-saved {saved.FORMAT} ".encode()
    (directory / "state").write_bytes(data.replace(old, f"nagaya-saved {saved.FORMAT + 1} ".encode()))


def cut_memory(directory: Path) -> None:
    os.truncate(directory / "memory", MEMORY_BYTES // 2)


def flip_memory(directory: Path) -> None:
    with (directory / "memory").open("r+b") as file:
        file.seek(TEXT_GPA + 5)
        file.write(b"\xff")


def another_cpu(directory: Path) -> None:
    state = json.loads((directory / "state").read_bytes().partition(b"\n")[2])
    leaves = state["leaves"]
    leaves[1][3][2] ^= 1 << 9
    rewrite(directory, leaves=leaves, cpu="Another CPU")


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        (cut_state, IntegrityError, "damaged"),
        (flip_state, IntegrityError, "damaged"),
        (raise_format, Unsupported, "format"),
        (lambda place: rewrite(place, version="99.0"), Unsupported, "99.0"),
        (lambda place: rewrite(place, vcpus=[]), IntegrityError, "CPUs"),
        (lambda place: rewrite(place, devices="none"), IntegrityError, "does not say"),
        (lambda place: (place / "state").unlink(), IntegrityError, "no saved machine"),
        (lambda place: (place / "memory").unlink(), IntegrityError, "no memory"),
        (cut_memory, IntegrityError, "bytes"),
        (flip_memory, IntegrityError, "damaged"),
        (lambda place: rewrite(place, kvm="imaginary"), Unsupported, "imaginary"),
        (another_cpu, Unsupported, "Another CPU"),
    ],
    ids=[
        "state cut", "state flipped", "another format", "another version", "no CPUs", "no devices", "no state", "no memory",
        "memory cut", "memory flipped", "another KVM", "another CPU",
    ],
)  # fmt: skip
def test_what_is_not_whole_or_not_for_this_host_is_refused(
    directory: Path, kernel: str, disk: Path, damage: Callable[[Path], Any], error: type[NagayaError], word: str
) -> None:
    damage(directory)
    with pytest.raises(error) as caught:
        go_on(directory, kernel, disk).close()
    assert word in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("changes", [{"memory_bytes": MEMORY_BYTES // 2}, {"cpus": 2}, {"acpi": False}])
def test_other_hardware_is_refused(directory: Path, kernel: str, disk: Path, changes: dict[str, Any]) -> None:
    found = saved.read(str(directory))
    try:
        with Machine(hardware(kernel, **changes), devices(disk), saved=found) as machine, pytest.raises(Unsupported):
            machine.start()
    finally:
        found.close()


def test_what_is_not_for_this_host_is_known_beforehand(directory: Path, kernel: str) -> None:
    def check() -> None:
        state = saved.read_state(str(directory))
        check_host(state, hardware(kernel), software_kvm=find_kvm().kind == PVM)

    check()
    another_cpu(directory)
    with pytest.raises(Unsupported, match="Another CPU"):
        check()
    rewrite(directory, kvm="imaginary")
    with pytest.raises(Unsupported, match="imaginary"):
        check()


def test_a_file_that_was_not_written_to_is_not_summed_up(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed = []
    monkeypatch.setattr(saved, "_sum", lambda fd, size: summed.append(fd) or [])
    saved.read(str(directory)).close()
    assert not summed
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("state", "memory"):
        (copy / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(IntegrityError):
        saved.read(str(copy))
    assert summed


def test_other_devices_are_refused(directory: Path, kernel: str) -> None:
    found = saved.read(str(directory))
    try:
        with (
            Machine(hardware(kernel), (Rng("rng0"),), saved=found) as machine,
            pytest.raises(Unsupported, match="devices"),
        ):
            machine.start()
    finally:
        found.close()
