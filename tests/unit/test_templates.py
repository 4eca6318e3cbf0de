"""The cache of templates, the disk that is only reserved, and memory that is written and mapped back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya.engines.kvm import saved, template
from nagaya.engines.kvm.template import Mold
from nagaya.errors import NotFound, UsageError
from nagaya.memory import PAGE_BYTES, GuestMemory
from nagaya.storage import disks
from nagaya.virtio.loop import Loop

SIZE = 1 << 20


@pytest.fixture
def mold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mold:
    """Of files that there are, in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("kernel", "agent"):
        (tmp_path / name).write_text(name)
    return Mold(str(tmp_path / "kernel"), str(tmp_path / "agent"), "console=hvc0", SIZE, 1, ("tap",), "pvm")


def put(mold: Mold, *, age_s: int = 0) -> str:
    """A template that holds nothing."""
    path = f"{template.directory()}/{template.make_id(mold.key)}"
    os.makedirs(path)
    memory = GuestMemory.allocate(SIZE)
    files = saved.create(path)
    parts = {"hardware": {"memory_bytes": SIZE, "cpus": mold.cpus}, "kvm": "pvm", "cpu": "", "leaves": [], "vm": {}}
    saved.write(
        files, memory, {**parts, "vcpus": [], "devices": [], "notes": {"key": mold.key, "cards": " ".join(mold.cards)}}
    )
    files.close()
    memory.close()
    saved.commit(path)
    status = os.stat(f"{path}/{saved.STATE}")
    os.utime(f"{path}/{saved.STATE}", (status.st_mtime - age_s, status.st_mtime - age_s))
    return path


def test_a_template_is_found_by_all_that_it_was_made_of(mold: Mold, tmp_path: Path) -> None:
    assert template.find(mold) == "" and template.list_templates() == []
    path = put(mold)
    assert template.find(mold) == path
    for other in (
        mold._replace(cpus=2),
        mold._replace(command_line="quiet"),
        mold._replace(cards=()),
        mold._replace(cards=("tap", "tap")),
        mold._replace(shares=True),
        mold._replace(kvm="x"),
    ):
        assert template.find(other) == ""
    (tmp_path / "agent").write_text("another")
    assert template.find(mold) == ""
    assert not template.is_current(template.list_templates()[0])


def test_using_one_makes_it_the_last_to_go(mold: Mold) -> None:
    molds = [mold._replace(cpus=number) for number in range(1, 5)]
    paths = [put(each, age_s=100 * each.cpus) for each in molds]
    assert [one.path for one in template.list_templates()] == paths
    template.find(molds[3])
    gone = template.prune(most=2)
    assert sorted(one.path for one in template.list_templates()) == sorted([paths[3], paths[0]])
    assert sorted(one.path for one in gone) == sorted(paths[1:3])


def test_pruning_takes_what_is_damaged_and_what_was_killed(mold: Mold) -> None:
    path = put(mold)
    os.truncate(f"{path}/{saved.STATE}", 100)
    os.mkdir(f"{template.directory()}/build.4711")
    assert template.prune() == []
    assert os.listdir(template.directory()) == []


def test_a_damaged_one_is_removed_when_it_is_to_be_used(mold: Mold) -> None:
    path = put(mold)
    os.truncate(f"{path}/{saved.MEMORY}", SIZE // 2)
    assert template.open_template(path, mold) is None
    assert not os.path.exists(path)


def test_one_of_another_key_is_not_used(mold: Mold) -> None:
    path = put(mold)
    assert template.open_template(path, mold._replace(cpus=3)) is None
    found = template.open_template(path, mold)
    assert found is not None
    found.close()


def test_names(mold: Mold) -> None:
    put(mold)
    put(mold._replace(cpus=2))
    ids = [one.id for one in template.list_templates()]
    assert template.get(ids[0]).id == ids[0]
    with pytest.raises(NotFound):
        template.get("nothing")
    with pytest.raises(NotFound):
        template.get("")


@pytest.mark.parametrize("text", ["0", "off", "no"])
def test_the_switch(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(template.SWITCH, text)
    assert not template.is_on()
    monkeypatch.delenv(template.SWITCH)
    assert template.is_on()


# -- memory


def test_memory_is_written_sparsely_and_mapped_back_twice(tmp_path: Path) -> None:
    memory = GuestMemory.allocate(SIZE)
    memory.write(3 * PAGE_BYTES + 5, b"three")
    memory.write(9 * PAGE_BYTES, bytes(PAGE_BYTES))  # touched, and still nothing
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    assert memory.write_to(fd) == PAGE_BYTES
    memory.close()
    private = GuestMemory(os.dup(fd), SIZE, private=True)
    copy = GuestMemory.copy_of(fd, SIZE)
    for each in (private, copy):
        assert each.read(3 * PAGE_BYTES + 5, 5) == b"three"
        each.write(3 * PAGE_BYTES, b"mine")
        each.discard(3 * PAGE_BYTES, PAGE_BYTES)
        assert each.read(3 * PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)  # and not the file's again
        each.write(200 * PAGE_BYTES, b"new")
        other = os.open(tmp_path / f"again{each.private}", os.O_RDWR | os.O_CREAT)
        assert each.write_to(other) == PAGE_BYTES
        assert os.pread(other, 3, 200 * PAGE_BYTES) == b"new"
        os.close(other)
        each.close()
    assert os.pread(fd, 5, 3 * PAGE_BYTES + 5) == b"three"
    os.close(fd)


# -- disks


def test_a_reserved_disk_is_blank_until_it_is_made(tmp_path: Path) -> None:
    path = str(tmp_path / "disk")
    disks.reserve_data_disk(path, 64 << 20)
    fd = os.open(path, os.O_RDWR)
    assert disks.is_blank(fd) and os.fstat(fd).st_blocks == 0
    disks.format_data_disk(fd)
    assert not disks.is_blank(fd)
    other = str(tmp_path / "other")
    disks.reserve_data_disk(other, 64 << 20)
    copy = os.open(other, os.O_RDWR)
    disks.copy_data_disk(path, copy)
    assert Path(other).read_bytes() == Path(path).read_bytes()
    smaller = str(tmp_path / "smaller")
    disks.reserve_data_disk(smaller, 65 << 20)
    third = os.open(smaller, os.O_RDWR)
    with pytest.raises(OSError, match="one size"):
        disks.copy_data_disk(path, third)
    assert disks.is_blank(third)
    for each in (fd, copy, third):
        os.close(each)
    with pytest.raises(UsageError):
        disks.reserve_data_disk(str(tmp_path / "tiny"), 1000)


# -- loops


def test_a_held_loop_stands_until_it_is_let_go() -> None:
    loop = Loop("test")
    assert loop.hold()() is None  # without a thread there is nothing to hold
    loop.start()
    heard: list[int] = []
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    loop.watch(fd, lambda: heard.append(os.eventfd_read(fd)))
    release = loop.hold()
    os.eventfd_write(fd, 1)
    assert not heard
    release()
    loop.call(lambda: None)
    while not heard:
        pass
    loop.close()
    os.close(fd)
