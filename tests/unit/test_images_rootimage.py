"""Root images without making one: their names, what counts as whole, what is said when one cannot be made."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest

from nagaya.errors import Unsupported
from nagaya.images.image import Image, ImageConfig
from nagaya.images.merged import merge
from nagaya.images.progress import Silent
from nagaya.images.rootimage import chain_id, find_root_image, make_root_image, root_image_path
from nagaya.images.store import ImageStore

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def image(*layers: str) -> Image:
    return Image(C, C, ("app:latest",), "linux/amd64", 0, 0, layers, ImageConfig(), "test")


def test_chain_ids_are_the_specification_s() -> None:
    assert chain_id((A,)) == A
    two = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    assert chain_id((A, B)) == two
    assert chain_id((A, B, C)) == "sha256:" + hashlib.sha256(f"{two} {C}".encode()).hexdigest()
    assert len({chain_id(()), chain_id((A,)), chain_id((A, B)), chain_id((B, A))}) == 4
    assert root_image_path("/r", (A,)) == f"/r/roots/{'a' * 64}.erofs"


def superblock(*, magic: int = 0xE0F5E1E2, blocks: int = 2, uuid: str = "aa" * 16) -> bytes:
    return bytes(1024) + struct.pack("<I32xIII16s48x", magic, blocks, 0, 0, bytes.fromhex(uuid))


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (superblock().ljust(8192, b"\0"), True),
        (superblock().ljust(8191, b"\0"), False),  # cut short
        (superblock(), False),
        (superblock()[:1100], False),
        (b"", False),
        (bytes(8192), False),  # never written
        (superblock(magic=0xEF53).ljust(8192, b"\0"), False),
        (superblock(blocks=0).ljust(8192, b"\0"), False),
        (superblock(uuid="bb" * 16).ljust(8192, b"\0"), False),  # another image's
    ],
)
def test_only_a_whole_image_of_these_layers_is_found(tmp_path: Path, content: bytes, whole: bool) -> None:
    store = ImageStore(str(tmp_path))
    assert find_root_image(store, image(A)) is None
    path = Path(root_image_path(store.root, (A,)))
    path.parent.mkdir()
    path.write_bytes(content)
    assert find_root_image(store, image(A)) == (str(path) if whole else None)
    assert find_root_image(store, image(A, B)) is None


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    store = ImageStore(str(tmp_path))
    path = Path(root_image_path(store.root, (A,)))
    path.parent.mkdir()
    path.symlink_to("/etc/passwd")
    with pytest.raises(Exception, match="cannot read the root image of app:latest"):
        find_root_image(store, image(A))


def test_without_the_program_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(Unsupported) as refusal:
        make_root_image(ImageStore(str(tmp_path)), image(A), progress=Silent())
    assert refusal.value.hint == "apt install erofs-utils" and "mkfs.erofs" in refusal.value.message


def test_layers_merge_by_name(tmp_path: Path) -> None:
    top, bottom = tmp_path / "top", tmp_path / "bottom"
    for path in ("both/new", "file_over_dir", "new/x"):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text("top")
    for path in ("both/new", "both/old", "file_over_dir/inside", "old/y", "dir_over_file"):
        (bottom / path).parent.mkdir(parents=True, exist_ok=True)
        (bottom / path).write_text("bottom")
    (top / "dir_over_file").mkdir()
    nodes, marked, dangling = merge((str(top), str(bottom)))
    assert not marked and not dangling
    tree = {os.fsdecode(node.path): [name.decode() for name, _ in node.children] for node in nodes}
    assert tree == {
        str(top): ["both", "dir_over_file", "file_over_dir", "new", "old"],
        f"{top}/both": ["new", "old"],
        f"{top}/dir_over_file": [],
        f"{top}/new": ["x"],
        f"{bottom}/old": ["y"],
    }
    children = dict(next(node for node in nodes if node.path == os.fsencode(top / "both")).children)
    assert children[b"new"].path == os.fsencode(top / "both/new")
    assert children[b"old"].path == os.fsencode(bottom / "both/old")


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=fd)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    with pytest.raises(Unsupported, match="too long"):
        merge((str(tmp_path),))
    from nagaya.storage.tree import remove_tree

    remove_tree(f"{tmp_path}/{'d' * 200}")
