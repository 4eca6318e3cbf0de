"""What `inspect` says of a type is what its engine can do."""

from __future__ import annotations

import pytest

from nagaya.engines import TYPES, open_engine
from nagaya.engines.base import FEATURES
from nagaya.engines.vm.rules import check_spec
from nagaya.errors import NagayaError, Unsupported, UsageError
from nagaya.model.spec import Limits, MachineSpec, Process, Security

# Features that are abilities of the engine's object, and by which name `capabilities` has them.
ABILITIES = {"pause": ("pause", "resume"), "stats": ("stats",), "limits": ("set_limits",), "offline": ("start_applet",)}


def make_spec(type_: str) -> MachineSpec:
    return MachineSpec(
        id="0" * 32, name="m", type=type_, image="i", image_id="sha256:0", platform="linux/amd64",
        process=Process(("true",)), hostname="h", created_ns=0,
    )  # fmt: skip


@pytest.mark.parametrize("type_", TYPES)
def test_what_is_missing_has_a_reason_and_a_name(type_: str) -> None:
    engine = open_engine(type_)
    assert set(engine.missing) <= set(FEATURES)
    assert all(reason and not reason.endswith(".") for reason in engine.missing.values())


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("feature", ABILITIES)
def test_abilities_are_what_the_engine_has(type_: str, feature: str) -> None:
    engine = open_engine(type_)
    has = all(callable(getattr(engine, name, None)) for name in ABILITIES[feature])
    assert (feature in engine.capabilities) == has == (feature not in engine.missing)


CHANGES = {
    "host-network": {"network": "host"},
    "userns": {"userns": "auto"},
    "seccomp-profile": {"security": Security(seccomp="/etc/hosts")},
    "cpuset": {"limits": Limits(cpuset_cpus="0")},
    "blkio": {"limits": Limits(blkio_weight=100)},
    "storage": {"limits": Limits(storage_bytes=1 << 30)},
}


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("feature", CHANGES)
def test_who_asks_for_what_is_missing_is_told(type_: str, feature: str) -> None:
    engine = open_engine(type_)
    plain = make_spec(type_)
    try:
        engine.check_host()
        before = engine.check(plain)
    except NagayaError as missing:
        pytest.skip(f"needs {type_}: {missing}")
    if feature not in engine.missing:
        return
    try:
        warnings = engine.check(plain._replace(**CHANGES[feature]))
    except NagayaError as refusal:
        assert refusal.message and not refusal.message.endswith(".")
    else:
        assert len(warnings) > len(before)


@pytest.mark.parametrize("changes", [{"kernel": "/boot/vmlinuz"}, {"append": "quiet"}])
def test_a_container_has_no_kernel_to_choose(changes: dict[str, str]) -> None:
    with pytest.raises(Unsupported, match="this host's kernel"):
        open_engine("container").check(make_spec("container")._replace(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "/no/such/kernel"}, "--kernel: cannot read /no/such/kernel"),
        ({"kernel": "/dev/null"}, "--kernel: /dev/null is no file"),
        ({"kernel": "/etc"}, "--kernel: /etc is no file"),
        ({"append": "a\nb"}, "one printable line"),
        ({"append": "x" * 1025}, "at most 1024 bytes"),
    ],
)
def test_a_kernel_that_cannot_be(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_spec(make_spec("kvm")._replace(**changes))
    assert check_spec(make_spec("kvm")._replace(kernel="/etc/hosts", append="a=1 b")) == []
