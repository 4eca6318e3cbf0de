"""From a machine's security settings to capability masks and resource limits."""

from __future__ import annotations

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.engines.container import policy
from nagaya.errors import UsageError
from nagaya.kernel import capabilities
from nagaya.model.spec import Security, Ulimit

ALL = (1 << len(capabilities.NAMES)) - 1
NAMES = st.lists(st.sampled_from(("ALL", *capabilities.NAMES)), max_size=6).map(tuple)


@pytest.fixture(autouse=True)
def full_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose root has every capability, whichever one the tests run on."""
    monkeypatch.setattr(capabilities, "bounding_set", lambda: ALL)


def names(**settings: tuple[str, ...]) -> set[str]:
    return set(capabilities.names_of(policy.capability_mask(Security(**settings))))  # type: ignore[arg-type]


def test_the_default_is_dockers_fourteen() -> None:
    assert names() == {
        "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW",
        "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
    }  # fmt: skip


def test_adding_and_dropping() -> None:
    assert names(cap_add=("NET_ADMIN",)) == names() | {"NET_ADMIN"}
    assert names(cap_drop=("MKNOD",)) == names() - {"MKNOD"}
    assert names(cap_drop=("ALL",)) == set()
    assert names(cap_drop=("ALL",), cap_add=("CHOWN",)) == {"CHOWN"}
    assert names(cap_add=("ALL",)) == set(capabilities.NAMES)
    assert names(cap_add=("ALL",), cap_drop=("SYS_ADMIN",)) == set(capabilities.NAMES) - {"SYS_ADMIN"}
    assert names(cap_add=("SYS_ADMIN",), cap_drop=("SYS_ADMIN",)) == names()  # what is dropped stays dropped


@given(add=NAMES, drop=NAMES)
def test_what_is_dropped_by_name_is_never_granted(add: tuple[str, ...], drop: tuple[str, ...]) -> None:
    capability_set = policy.capability_mask(Security(cap_add=add, cap_drop=drop))
    dropped = capabilities.mask(tuple(name for name in drop if name != "ALL"))
    assert capability_set & dropped == 0
    assert capability_set & ~ALL == 0


def test_no_more_than_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    without = ALL & ~capabilities.mask(("SYS_RESOURCE", "CHOWN"))
    monkeypatch.setattr(capabilities, "bounding_set", lambda: without)
    assert "CHOWN" not in names()
    assert "SYS_RESOURCE" not in names(cap_add=("ALL",))
    assert policy.missing_capabilities(Security(cap_add=("SYS_RESOURCE", "NET_ADMIN", "ALL"))) == ("SYS_RESOURCE",)


@pytest.mark.parametrize("bad", ["NET_ADMINS", "CAP_CHOWN", "chown", ""])
def test_an_unknown_capability(bad: str) -> None:
    for settings in (Security(cap_add=(bad,)), Security(cap_drop=(bad,))):
        with pytest.raises(UsageError, match="there is no capability") as caught:
            policy.capability_mask(settings)
        assert "capabilities(7)" in caught.value.hint


def test_the_agent_keeps_what_it_needs_to_start_programs_as_any_user() -> None:
    none = policy.capability_mask(Security(cap_drop=("ALL",)))
    assert set(capabilities.names_of(policy.agent_mask(none))) == names()
    assert policy.agent_mask(capabilities.mask(("NET_ADMIN",))) & capabilities.mask(("SYS_ADMIN", "SYS_PTRACE")) == 0


@given(st.sets(st.sampled_from(capabilities.NAMES)))
def test_masks_and_names_are_inverse(chosen: set[str]) -> None:
    assert set(capabilities.names_of(capabilities.mask(tuple(chosen)))) == chosen


# -- resource limits


def test_ulimits_become_numbers() -> None:
    limits = policy.rlimits((Ulimit("nofile", 10, 20), Ulimit("core", 0, -1)))
    assert limits == ((resource.RLIMIT_NOFILE, 10, 20), (resource.RLIMIT_CORE, 0, policy.UNLIMITED))


@pytest.mark.parametrize(
    "limit", [Ulimit("files", 1, 1), Ulimit("nofile", 20, 10), Ulimit("nofile", -1, 10), Ulimit("nofile", -2, 10)]
)
def test_bad_ulimits(limit: Ulimit) -> None:
    with pytest.raises(UsageError):
        policy.rlimits((limit,))


def test_an_unknown_ulimit_lists_those_that_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        policy.rlimits((Ulimit("files", 1, 1),))
    assert "nofile" in caught.value.hint and "rtprio" in caught.value.hint


def fake_host(monkeypatch: pytest.MonkeyPatch, *, hard: int, may_raise: bool) -> None:
    held = capabilities.mask(("SYS_RESOURCE",)) if may_raise else 0
    monkeypatch.setattr(capabilities, "get_sets", lambda: capabilities.Sets(held, held, 0))
    monkeypatch.setattr(resource, "getrlimit", lambda number: (hard, hard))
    monkeypatch.setattr(policy, "_files_at_most", lambda: 1000)


def test_a_host_that_forbids_raising_degrades_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_host(monkeypatch, hard=100, may_raise=False)
    settled, warnings = policy.settle_rlimits(((resource.RLIMIT_NOFILE, 150, 200), (resource.RLIMIT_NPROC, 5, 100)))
    assert settled == ((resource.RLIMIT_NOFILE, 100, 100), (resource.RLIMIT_NPROC, 5, 100))
    assert len(warnings) == 1 and "nofile above 100" in warnings[0] and "CAP_SYS_RESOURCE" in warnings[0]


def test_a_host_that_may_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_host(monkeypatch, hard=100, may_raise=True)
    wanted = ((resource.RLIMIT_NOFILE, 150, 200), (resource.RLIMIT_MEMLOCK, policy.UNLIMITED, policy.UNLIMITED))
    assert policy.settle_rlimits(wanted) == (wanted, ())
    settled, warnings = policy.settle_rlimits(((resource.RLIMIT_NOFILE, 5, policy.UNLIMITED),))
    assert settled == ((resource.RLIMIT_NOFILE, 5, 1000),) and "fs.nr_open" in warnings[0]


def test_an_unlimited_host_forbids_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_host(monkeypatch, hard=resource.RLIM_INFINITY, may_raise=False)
    wanted = ((resource.RLIMIT_CORE, policy.UNLIMITED, policy.UNLIMITED),)
    assert policy.settle_rlimits(wanted) == (wanted, ())
