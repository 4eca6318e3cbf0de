"""Start-up is a feature: what the processes of a `run` may import, and how many modules of ours.

Measured in milliseconds on top of a bare interpreter: typing 7, dataclasses 7 to 15, subprocess 16, http.server 35, asyncio 43,
urllib.request and ssl more than that. A module that needs one imports it in the function that does.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SLOW = frozenset(
    [
        "argparse",
        "asyncio",
        "bz2",
        "concurrent",
        "dataclasses",
        "datetime",
        "email",
        "gzip",
        "hashlib",
        "http",
        "inspect",
        "logging",
        "lzma",
        "multiprocessing",
        "pathlib",
        "pickle",
        "platform",
        "random",
        "shutil",
        "socket",
        "sqlite3",
        "ssl",
        "string",
        "subprocess",
        "tarfile",
        "tempfile",
        "textwrap",
        "threading",
        "traceback",
        "typing",
        "typing_extensions",
        "unittest",
        "urllib",
        "urllib3",
        "uuid",
        "xml",
        "zipfile",
        "zstandard",
    ]
)
# program text -> the most modules of ours that it may bring in
PATHS = {
    "the front door": ("from nagaya.cli import main; main(['version'])", 20),
    "ps": ("from nagaya.cli import main; main(['ps', '-a'])", 55),
    "the manager": ("import nagaya.manager.host, nagaya.manager.machines, nagaya.images.store", 60),
    "the supervisor": ("import nagaya.supervisor.entry, nagaya.supervisor.supervisor", 50),
    "the engine": ("from nagaya.engines import open_engine; open_engine('container')", 45),
    "the kvm engine, to its machine": ("from nagaya.engines import open_engine; open_engine('kvm').preload()", 105),
    "the VMM": ("import nagaya.engines.kvm.machine, nagaya.engines.kvm.pvm", 36),
}


def loaded_by(program: str, root: str) -> set[str]:
    """The modules that `program` brings in and that a bare interpreter has not."""
    show = "\nprint('\\n'.join(sorted(set(sys.modules) - before)))"
    code = f"import sys; before = set(sys.modules)\n{program}{show}"
    environment = {**os.environ, "NAGAYA_ROOT": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", PATHS)
def test_budget(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    program, most = PATHS[name]
    loaded = loaded_by(program, str(tmp_path_factory.mktemp("root")))
    slow = {module for module in loaded if module.split(".")[0] in SLOW}
    assert not slow, f"{name} imports {sorted(slow)}"
    ours = sorted(module for module in loaded if module.split(".")[0] == "nagaya")
    assert 0 < len(ours) <= most, f"{name} imports {len(ours)} modules of ours, and may {most}: {ours}"


def test_vmm_does_without_what_takes_it_a_sixth_of_its_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A guest of a few bytes is there for 10 ms: functools and collections would take 2 of them, whoever brings them."""
    loaded = loaded_by(PATHS["the VMM"][0], str(tmp_path_factory.mktemp("root")))
    assert not loaded & {"collections", "functools", "threading"}


def test_a_slow_import_is_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert "tempfile" in loaded_by("import nagaya.errors, tempfile", str(tmp_path_factory.mktemp("root")))
