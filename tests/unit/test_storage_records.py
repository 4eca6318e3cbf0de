"""Records on disk are untrusted: what does not fit its declaration is refused, and a write is whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from nagaya.errors import IntegrityError
from nagaya.model.spec import Device, Limits, MachineSpec, Mount, Process, Restart, Ulimit
from nagaya.model.state import MachineState
from nagaya.storage import records

SPEC = MachineSpec(
    id="a" * 32,
    name="n",
    type="container",
    image="debian",
    image_id="sha256:" + "0" * 64,
    platform="linux/amd64",
    process=Process(("sh", "-c", "echo \udcff"), env=("A=b",), tty=True),
    hostname="h",
    created_ns=1,
    mounts=(Mount("bind", "/", "/x"), Mount("tmpfs", "", "/y", size_bytes=5)),
    devices=(Device("/dev/kvm", "/dev/kvm"),),
    ulimits=(Ulimit("nofile", 1, -1),),
    sysctls=(("kernel.shmmax", "1"),),
    limits=Limits(memory_bytes=1 << 40),
    restart=Restart("on-failure", 3),
    stop_timeout_s=0.5,
    labels=(("a", "b"),),
)


@pytest.mark.parametrize("value", [SPEC, MachineState(), MachineState(phase="running", warnings=("a", "b"))])
def test_round_trip(tmp_path: Path, value: NamedTuple) -> None:
    path = str(tmp_path / "r.json")
    records.store(path, value, durable=True)
    assert records.load(path, type(value)) == value
    assert os.listdir(tmp_path) == ["r.json"]
    assert os.stat(path).st_mode & 0o777 == 0o600


def _spoil(**changes: object) -> bytes:
    return json.dumps({**records.to_data(SPEC), **changes}).encode()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected an object"),
        (b"{}", "missing"),
        (_spoil(more=1), "more"),
        (_spoil(name=1), "name"),
        (_spoil(name=None), "name"),
        (_spoil(created_ns="1"), "created_ns"),
        (_spoil(created_ns=True), "created_ns"),
        (_spoil(mounts={}), "mounts"),
        (_spoil(mounts=[{"kind": "bind"}]), "mounts"),
        (_spoil(sysctls=[["a"]]), "sysctls"),
        (_spoil(process=[]), "process"),
        (_spoil(limits={"memory_bytes": 1.5}), "memory_bytes"),
    ],
)
def test_malformed_is_refused_by_name(tmp_path: Path, raw: bytes, named: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=named):
        records.load(str(path), MachineSpec)


def test_whole_numbers_serve_as_floats() -> None:
    assert records.from_data(MachineSpec, {**records.to_data(SPEC), "stop_timeout_s": 3}).stop_timeout_s == 3.0


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    records.write_file(path, b"old")
    os.mkdir(f"{path}.{os.getpid()}.tmp")  # the temporary file cannot be made
    with pytest.raises(OSError):
        records.write_file(path, b"new")
    assert Path(path).read_bytes() == b"old"
