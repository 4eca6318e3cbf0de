"""Volumes: names, first use, removal, and what a kill half-way leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya.errors import Conflict, NotFound, UsageError
from nagaya.storage.rootfs import find_in_layers
from nagaya.storage.volumes import Volumes


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    return Volumes(str(tmp_path))


def test_life(volumes: Volumes) -> None:
    made = volumes.create("a", labels=(("k", "v"),))
    assert volumes.get("a") == made
    assert os.path.isdir(made.path)
    assert volumes.ensure("a") == made
    assert len(volumes.create().name) == 32
    with pytest.raises(Conflict):
        volumes.create("a")
    with pytest.raises(Conflict, match="used"):
        volumes.remove("a", in_use=frozenset(("a",)))
    volumes.remove("a")
    with pytest.raises(NotFound):
        volumes.remove("a")
    volumes.remove("a", force=True)
    assert len(volumes.prune()) == 1
    assert volumes.list() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "x" * 129, ".trash-x"])
def test_bad_names(volumes: Volumes, name: str) -> None:
    for call in (volumes.get, volumes.remove, *(() if not name else (volumes.create,))):
        with pytest.raises(UsageError):
            call(name)


def test_prune_spares_what_is_used(volumes: Volumes) -> None:
    for name in ("a", "b", "c"):
        volumes.create(name)
    assert volumes.prune(in_use=frozenset(("b",))) == ["a", "c"]
    assert [volume.name for volume in volumes.list()] == ["b"]


def test_first_use_takes_what_the_image_has(volumes: Volumes, tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower" / "data", tmp_path / "upper" / "data"
    (lower / "sub").mkdir(parents=True)
    upper.mkdir(parents=True)
    (lower / "file").write_text("old")
    (lower / "sub" / "deep").write_text("deep")
    (upper / "file").write_text("new")
    volume = volumes.create("a")
    sources = find_in_layers((str(tmp_path / "upper"), str(tmp_path / "lower")), "/data")
    assert sources == (str(upper), str(lower))
    volumes.populate(volume, sources)
    assert (Path(volume.path) / "file").read_text() == "new"
    assert (Path(volume.path) / "sub" / "deep").read_text() == "deep"
    (Path(volume.path) / "file").write_text("mine")
    volumes.populate(volume, sources)
    assert (Path(volume.path) / "file").read_text() == "mine"


def test_a_population_that_was_cut_off_is_done_anew(volumes: Volumes, tmp_path: Path) -> None:
    source = tmp_path / "layer" / "data"
    source.mkdir(parents=True)
    (source / "file").write_text("x")
    volume = volumes.create("a")
    half = Path(volume.path).parent / "copy"
    half.mkdir()
    (half / "garbage").write_text("half")
    volumes.populate(volume, (str(source),))
    assert os.listdir(volume.path) == ["file"]


def test_leftovers_are_swept(volumes: Volumes, tmp_path: Path) -> None:
    volumes.create("a")
    trash = tmp_path / "volumes" / ".trash-0011"
    (trash / "data").mkdir(parents=True)
    (tmp_path / "volumes" / "half" / "data").mkdir(parents=True)  # killed before its record was written
    assert [volume.name for volume in volumes.list()] == ["a"]
    assert not trash.exists()
    assert volumes.create("half").name == "half"


def test_links_on_the_way_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "layer" / "real" / "data").mkdir(parents=True)
    (tmp_path / "layer" / "link").symlink_to("real")
    assert find_in_layers((str(tmp_path / "layer"),), "/link/data") == ()
    assert find_in_layers((str(tmp_path / "layer"),), "/none") == ()
