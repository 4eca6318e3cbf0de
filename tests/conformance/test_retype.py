"""`update --type`: a machine that does not run gets other walls, and keeps its data."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from nagaya import CreateOptions, Host, Machine
from nagaya.engines import open_engine
from nagaya.errors import Conflict, NagayaError, Unsupported, UsageError
from nagaya.manager.attachment import Attachment
from nagaya.manager.options import UpdateOptions
from nagaya.model.spec import Limits
from tests.conformance.types import PATIENCE_S

# Everything an overlay can say of a change: new, changed, deleted, replaced as a whole, linked, owned, marked.
WRITE = """
mkdir /root/d && echo one > /root/d/a && ln /root/d/a /root/d/b && ln -s a /root/d/link
chown 1000:50 /root/d/a && chmod 4751 /root/d/a
rm /bin/tail && rm -r /home && mkdir /home && echo new > /home/only
echo more >> /etc/group && dd if=/dev/urandom of=/root/big bs=1024 count=3000 2>/dev/null && md5sum /root/big > /root/sum
"""
READ = """
cat /root/d/a /root/d/link /etc/group /home/only && ls /home /root/d && md5sum -c /root/sum
stat -c '%h %u:%g %a %s' /root/d/a /root/d/b / /root/d; readlink /root/d/link; test -e /bin/tail || echo no tail
"""


def _require_emulator() -> None:
    try:
        open_engine("emulated").check_host()
    except Unsupported as missing:
        pytest.skip(f"needs qemu: {missing}")


@pytest.fixture
def machine(host: Host) -> Iterator[Machine]:
    _require_emulator()
    made = host.machines.create(CreateOptions("box", command=("sh",), stdin=True, type="container", network="none"))
    yield made
    try:
        made.remove(force=True, volumes=True)
    except NagayaError:
        pass


def _do(machine: Machine, script: str) -> bytes:
    attachment = machine.start(attach=True)
    assert isinstance(attachment, Attachment)
    with attachment:
        status, out, err = attachment.communicate(script.encode(), timeout_s=PATIENCE_S)
    assert (status, err) == (0, b"")
    return out


@pytest.mark.timeout(240)
def test_data_goes_along_and_back(machine: Machine) -> None:
    _do(machine, WRITE)
    before = _do(machine, READ)
    assert before.startswith(b"one\none\n") and b"no tail" in before and b"4751" in before
    changed = machine.diff()
    for type_ in ("emulated", "container", "emulated"):
        (sentence,) = machine.update(UpdateOptions(type=type_))
        assert type_ in sentence
        assert machine.inspect()["type"] == type_
        assert set(changed) <= set(machine.diff())
        assert _do(machine, READ) == before
    assert not os.path.exists(f"{machine.directory}/upper")


@pytest.mark.timeout(120)
def test_a_machine_that_never_ran(machine: Machine) -> None:
    machine.update(UpdateOptions(type="emulated"))
    assert _do(machine, "cat /data/seed\n") == b"from the image\n"
    machine.update(UpdateOptions(type="container"))
    assert _do(machine, "cat /data/seed\n") == b"from the image\n"


def test_what_cannot_be(machine: Machine) -> None:
    with pytest.raises(UsageError, match="unknown machine type"):
        machine.update(UpdateOptions(type="jail"))
    with pytest.raises(UsageError, match="nothing to update"):
        machine.update(UpdateOptions(type="container"))
    with pytest.raises(UsageError, match="no disk of its own"):
        machine.update(UpdateOptions(storage_bytes=1 << 30))
    with pytest.raises(UsageError, match="64 MiB or more"):
        machine.update(UpdateOptions(type="emulated", memory_bytes=16 << 20))
    with machine.start(attach=True) as attachment:  # type: ignore[union-attr]
        with pytest.raises(Conflict, match="runs"):
            machine.update(UpdateOptions(type="emulated"))
        attachment.communicate(b"exit\n", timeout_s=PATIENCE_S)
    assert machine.spec.type == machine.inspect()["type"] == "container"
    assert machine.spec.limits == Limits()
    assert not os.path.exists(f"{machine.directory}/data.img")


@pytest.mark.timeout(120)
def test_a_disk_grows(machine: Machine) -> None:
    machine.update(UpdateOptions(type="emulated", storage_bytes=128 << 20))
    _do(machine, "echo kept > /root/kept\n")
    machine.update(UpdateOptions(storage_bytes=256 << 20))
    with pytest.raises(UsageError, match="cannot be made smaller"):
        machine.update(UpdateOptions(storage_bytes=128 << 20))
    assert os.path.getsize(f"{machine.directory}/data.img") == 256 << 20
    assert _do(machine, "cat /root/kept\n") == b"kept\n"
