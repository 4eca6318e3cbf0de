"""What is settled for new machines: a flag before the environment before the user's file before the host's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nagaya import engines
from nagaya.cli.commands.run import RUN
from nagaya.cli.create_flags import read_options
from nagaya.cli.flags import parse
from nagaya.engines.kvm import known, speed
from nagaya.errors import Unsupported, UsageError
from nagaya.kernels import cache
from nagaya.manager import settings
from nagaya.manager.options import CreateOptions, UpdateOptions
from nagaya.manager.updating import plan_update
from nagaya.model.spec import MachineSpec, Process


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the user's file, the host's), neither of which is there yet."""
    user, system = tmp_path / "nagaya" / "config.toml", tmp_path / "system.toml"
    user.parent.mkdir()
    monkeypatch.delenv("NAGAYA_TYPE", raising=False)
    monkeypatch.delenv("DOCKER_DEFAULT_PLATFORM", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(settings, "SYSTEM_FILE", str(system))
    return user, system


def options(*argv: str) -> CreateOptions:
    return read_options(parse("run", RUN, [*argv, "debian"]))


def test_the_order(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    user, system = files
    system.write_text('type = "emulated"\n')
    assert settings.choose_type("").type == "emulated"
    user.write_text('type = "kvm"\n')
    assert settings.choose_type("").type == "kvm"
    monkeypatch.setenv("NAGAYA_TYPE", "container")
    assert settings.choose_type("").type == "container"
    assert settings.choose_type("emulated").type == "emulated"


def test_each_key_has_its_own_order(files: tuple[Path, Path]) -> None:
    user, system = files
    system.write_text('memory = "1g"\ncpus = 1\nnetwork = "host"\n')
    user.write_text('memory = 536870912\nnetwork = "none"\n')
    found = options()
    assert (found.limits.memory_bytes, found.limits.cpus_milli, found.network) == (512 << 20, 1000, "none")
    found = options("--memory", "64m", "--cpus", "0", "--network", "bridge")
    assert (found.limits.memory_bytes, found.limits.cpus_milli, found.network) == (64 << 20, 0, "bridge")


def test_a_disk_is_for_those_that_have_one(files: tuple[Path, Path]) -> None:
    files[0].write_text('storage = "20g"\ntype = "emulated"\n')
    assert options().limits.storage_bytes == 20 << 30
    assert options("--storage", "30g").limits.storage_bytes == 30 << 30
    assert options("--type", "container").limits.storage_bytes == 0


def test_templates_are_for_those_who_want_them(files: tuple[Path, Path]) -> None:
    user, system = files
    assert options().template and not options("--no-template").template
    system.write_text("templates = false\n")
    assert not options().template
    user.write_text("templates = true\n")
    assert options().template and not options("--no-template").template
    user.write_text('templates = "no"\n')
    with pytest.raises(UsageError, match="is not true or false"):
        options()


def test_nothing_settled_is_nothing_changed() -> None:
    assert options() == CreateOptions(image="debian")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type = 'jail'", "'type' is not one of: container, kvm, emulated, auto"),
        ("type = 3", "'type' is not one of"),
        ("tpye = 'kvm'", "there is no setting 'tpye'"),
        ("[kvm]\nmemory = '1g'", "there is no setting 'kvm'"),
        ("network = 'wlan'", "'network' is not one of: bridge, host, none"),
        ("memory = true", "'memory' is not a size"),
        ("memory = ['1g']", "'memory' is not a size"),
        ("memory = 'much'", "'memory': 'much' is not a size"),
        ("cpus = -1", "'cpus': '-1' is not a number of CPUs"),
        ("type = kvm", "is not TOML"),
        ("type = 'kvm'\ntype = 'kvm'", "is not TOML"),
    ],
)
def test_one_sentence_names_file_and_key(files: tuple[Path, Path], text: str, message: str) -> None:
    files[0].write_text(text)
    with pytest.raises(UsageError) as caught:
        settings.choose_type(options().type)
    assert str(caught.value).startswith(str(files[0]))
    assert message in str(caught.value)
    assert caught.value.hint


def test_what_is_no_text_is_told(files: tuple[Path, Path]) -> None:
    files[0].write_bytes(b"type = '\xff'")
    with pytest.raises(UsageError, match="is not TOML"):
        options()
    files[0].unlink()
    files[0].mkdir()
    with pytest.raises(UsageError, match="cannot read the settings"):
        options()


def test_a_wrong_type_names_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^--type: unknown"):
        settings.choose_type("jail")
    monkeypatch.setenv("NAGAYA_TYPE", "jail")
    with pytest.raises(UsageError, match=r"^NAGAYA_TYPE: unknown"):
        settings.choose_type("")


def test_no_file_costs_no_import() -> None:
    code = "import sys; from nagaya.manager import settings; settings.SYSTEM_FILE = '/none'; settings.read_settings(); print('tomllib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# -- auto, which is what nobody's word means


KERNEL = SimpleNamespace(path="/built")


class Emulated:
    """An engine that says what it lacks."""

    def __init__(self, lacks: str) -> None:
        self.lacks = lacks

    def check_host(self, *, kernel: str = "") -> None:
        if self.lacks:
            raise Unsupported(self.lacks)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What the host has: a built kernel, which KVM ("" = none), what QEMU lacks, whether we are root, a kernel for PVM."""

    def have(*, kernel: bool = True, kvm: str = "", lacks: str = "", root: bool = True, own: bool = False) -> None:
        def probe() -> known.Finding:
            if not kvm:
                raise Unsupported("there is no /dev/kvm")
            return known.make_finding(kvm)

        monkeypatch.setattr(cache, "find_kernel", lambda architecture="": KERNEL if kernel else None)
        monkeypatch.setattr(speed, "find_kvm", probe)
        monkeypatch.setattr(speed, "can_leave_privileged_mode", lambda path: own and path in ("/built", "/named"))
        monkeypatch.setattr(engines, "open_engine", lambda type_: Emulated(lacks))
        monkeypatch.setattr("os.geteuid", lambda: 0 if root else 1000)

    return have


@pytest.mark.parametrize("root", [True, False])
def test_auto_is_kvm_where_the_cpu_runs_guests_itself(host: Callable[..., None], root: bool) -> None:
    host(kvm=known.HARDWARE, root=root)
    assert settings.choose_type("") == settings.choose_type("auto") == ("kvm", "")


@pytest.mark.parametrize("kernel", ["", "/named"])
def test_auto_is_kvm_where_the_kernel_is_made_for_its_emulation(host: Callable[..., None], kernel: str) -> None:
    host(kvm=known.PVM, own=True)
    assert settings.choose_type("", kernel=kernel) == ("kvm", "")
    assert settings.choose_type("", kernel="/other") == ("emulated", "")


@pytest.mark.parametrize("kvm", ["", known.PVM])
def test_auto_is_emulated_where_it_does_not(host: Callable[..., None], kvm: str) -> None:
    host(kvm=kvm)
    assert settings.choose_type("") == ("emulated", "")


def test_auto_says_that_it_took_a_container(host: Callable[..., None]) -> None:
    host(kernel=False, kvm=known.HARDWARE)
    choice = settings.choose_type("")
    assert choice.type == "container" and "no guest kernel has been built" in choice.note and "--type" in choice.note
    host(lacks="qemu-system-x86_64 is not installed")
    choice = settings.choose_type("")
    assert choice.type == "container" and "qemu-system-x86_64 is not installed" in choice.note


def test_auto_with_a_kernel_of_ones_own_needs_none_of_ours(host: Callable[..., None]) -> None:
    host(kernel=False, kvm=known.HARDWARE)
    assert settings.choose_type("", kernel="/boot/vmlinuz") == ("kvm", "")


def test_a_plain_user_hears_from_the_emulated_engine_what_is_missing(host: Callable[..., None]) -> None:
    host(kernel=False, root=False)
    assert settings.choose_type("") == ("emulated", "")


def test_a_settled_type_is_never_another_one(host: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    host(kernel=False)
    for name in ("kvm", "emulated", "container"):
        monkeypatch.setenv("NAGAYA_TYPE", name)
        assert settings.choose_type("") == (name, "")


def test_an_update_to_auto_says_what_that_is(host: Callable[..., None]) -> None:
    spec = MachineSpec(
        "0" * 32,
        "m",
        "container",
        "box",
        "sha256:" + "0" * 64,
        "linux/amd64",
        Process(("sh",)),
        hostname="m",
        created_ns=1,
    )
    host(kernel=False, kvm=known.HARDWARE)
    update = plan_update(spec, UpdateOptions(type="auto"))
    assert update.spec.type == "container"
    assert update.note.startswith("auto is container here, because no guest kernel has been built")
    host(kvm=known.HARDWARE)
    assert plan_update(spec, UpdateOptions(type="auto")) == (spec._replace(type="kvm"), "")
    assert plan_update(spec, UpdateOptions(type="emulated")).note == ""
