"""What is added to a Linux before it is compiled."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nagaya.kernels import patches
from nagaya.kernels.patches import Patch

HOOKS = """\
--- a/init/main.c
+++ b/init/main.c
@@ -1,2 +1,3 @@
 before
+hook
 after
"""


@pytest.fixture
def patch(tmp_path: Path) -> Patch:
    directory = tmp_path / "patch"
    directory.mkdir()
    (directory / "hooks.patch").write_text(HOOKS)
    (directory / "own.c").write_text("int own;\n")
    return Patch("ours", str(directory), "kernel", "CONFIG_OURS")


def make_tree(tmp_path: Path, main: str) -> Path:
    tree = tmp_path / "linux"
    (tree / "init").mkdir(parents=True)
    (tree / "kernel").mkdir()
    (tree / "init" / "main.c").write_text(main)
    return tree


def test_hooks_and_files_are_put_into_a_tree_that_they_fit(tmp_path: Path, patch: Patch) -> None:
    tree = make_tree(tmp_path, "before\nafter\n")
    assert patch.fits(str(tree))
    assert (tree / "init" / "main.c").read_text() == "before\nafter\n"
    subprocess.run(patch.command(str(tree)), check=True, capture_output=True)
    patch.copy_files(str(tree))
    assert (tree / "init" / "main.c").read_text() == "before\nhook\nafter\n"
    assert (tree / "kernel" / "own.c").read_text() == "int own;\n"
    assert not patch.fits(str(tree))


def test_another_linux_is_left_as_it_is(tmp_path: Path, patch: Patch) -> None:
    tree = make_tree(tmp_path, "something else\n")
    assert not patch.fits(str(tree))
    assert sorted(os.listdir(tree / "init")) == ["main.c"]


def test_each_file_is_part_of_the_digest(patch: Patch) -> None:
    digests = {patch.digest()}
    for name in ("own.c", "hooks.patch"):
        with open(os.path.join(patch.directory, name), "a", encoding="utf-8") as file:
            file.write("\n")
        digests.add(patch.digest())
    assert len(digests) == 3


def test_only_one_cpus_kernel_has_it() -> None:
    assert patches.shipped("aarch64") == ()
    (own,) = patches.shipped("x86_64")
    assert own.symbol in Path(os.path.dirname(patches.__file__), "x86_64.config").read_text()
