"""A container's mounts as data."""

from __future__ import annotations

import pytest

from nagaya.engines.container import mounts, rootfs
from nagaya.engines.container.mounts import CgroupMounts, MountStep, plan_mounts, plan_user_mount
from nagaya.errors import UsageError
from nagaya.kernel import mount as kernel
from nagaya.storage.plan import MountPlan

QUIET = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
V1 = CgroupMounts(v2=False, v1=(("memory", "memory"), ("cpu,cpuacct", "cpu,cpuacct")))
V2 = CgroupMounts(v2=True)


def bind(source: str = "/usr", target: str = "/data", **changes: object) -> MountPlan:
    plan = MountPlan("bind", source, target, False, "rprivate", 0, 0, ())
    return plan._replace(**changes)  # type: ignore[arg-type]


def tmpfs(target: str = "/scratch", **changes: object) -> MountPlan:
    plan = MountPlan("tmpfs", "", target, False, "rprivate", 0, 0o1777, ())
    return plan._replace(**changes)  # type: ignore[arg-type]


def plan(*user: MountPlan, cgroups: CgroupMounts = V2, **changes: object) -> tuple[MountStep, ...]:
    settings: dict[str, object] = {"host_network": False, "userns": False, "etc": (), **changes}
    return plan_mounts(user, cgroups=cgroups, **settings)  # type: ignore[arg-type]


def by_target(steps: tuple[MountStep, ...]) -> dict[str, MountStep]:
    return {step.target: step for step in steps}


def test_the_kernels_file_systems() -> None:
    steps = by_target(plan())
    assert [(step.fstype, step.target) for step in plan()] == [
        ("proc", "/proc"), ("tmpfs", "/dev"), ("devpts", "/dev/pts"), ("tmpfs", "/dev/shm"), ("mqueue", "/dev/mqueue"),
        ("sysfs", "/sys"), ("cgroup2", "/sys/fs/cgroup"),
    ]  # fmt: skip
    assert steps["/proc"].flags == QUIET
    assert steps["/sys"].flags == QUIET | kernel.MS_RDONLY
    assert steps["/sys/fs/cgroup"].flags == QUIET | kernel.MS_RDONLY
    assert steps["/dev"].flags & kernel.MS_NODEV == 0 and "size=65536k" in steps["/dev"].data
    assert "newinstance" in steps["/dev/pts"].data and "gid=5" in steps["/dev/pts"].data
    assert all(step.system for step in plan())


def test_version_1_control_groups_are_a_read_only_mount_each() -> None:
    steps = by_target(plan(cgroups=V1))
    assert steps["/sys/fs/cgroup"].fstype == "tmpfs"
    for name in ("memory", "cpu,cpuacct"):
        step = steps[f"/sys/fs/cgroup/{name}"]
        assert step.fstype == "cgroup" and step.data == name and step.flags & kernel.MS_RDONLY


def test_a_user_namespace_binds_devices_and_leaves_version_1_out() -> None:
    steps = by_target(plan(cgroups=V1, userns=True))
    assert steps["/dev/null"] == MountStep("", "/dev/null", "/dev/null", is_file=True, system=True)
    assert not any(target.startswith("/sys/fs/cgroup") for target in steps)
    assert steps["/sys"].fstype == "sysfs"
    assert by_target(plan(userns=True, host_network=True))["/sys"].fstype == ""  # sysfs goes with the network namespace


def test_the_users_mounts_come_last_and_hide_our_files() -> None:
    etc = (("/etc/hosts", "/run/hosts"), ("/etc/hostname", "/run/hostname"))
    steps = plan(tmpfs("/tmp"), bind(target="/etc/hosts"), etc=etc)
    assert [step.target for step in steps[-3:]] == ["/etc/hostname", "/tmp", "/etc/hosts"]
    assert not any(step.system for step in steps[-3:])
    assert "/etc/hostname" not in by_target(plan(bind(target="/etc"), etc=etc))


def test_flags_of_user_mounts() -> None:
    assert plan_user_mount(bind()).flags == 0
    assert plan_user_mount(bind(read_only=True, options=("nosuid", "nodev", "Z"))).flags == (
        kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    )
    assert plan_user_mount(tmpfs()).flags == QUIET
    assert plan_user_mount(tmpfs(options=("exec", "suid"))).flags == kernel.MS_NODEV
    assert plan_user_mount(tmpfs(size_bytes=4096, mode=0o700)).data == "mode=700,size=4096"
    assert plan_user_mount(bind(propagation="rslave")).propagation == "rslave"
    assert plan_user_mount(bind(source="/dev/null")).is_file and not plan_user_mount(bind()).is_file


def test_an_unknown_option_lists_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="unknown mount option 'rx'") as caught:
        plan_user_mount(bind(options=("rx",)))
    assert "nosuid" in caught.value.hint


@pytest.mark.parametrize(
    "target", ["/", "//", "/.", "/data/..", "/proc", "/proc/", "//proc", "/proc/sys", "/x/../proc/sys/kernel", "/proc/1", "relative", ""]
)  # fmt: skip
def test_places_that_no_mount_may_cover(target: str) -> None:
    for plan_ in (bind(target=target), tmpfs(target=target)):
        with pytest.raises(UsageError):
            plan_user_mount(plan_)


@pytest.mark.parametrize(
    "target", ["/procedures", "/host/proc", "/proc/cpuinfo", "/proc/meminfo", "/sys", "/dev", "/dev/shm", "/a b:c,d"]
)
def test_places_that_it_may(target: str) -> None:
    assert plan_user_mount(bind(target=target)).target == target


MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /private rw - tmpfs tmpfs rw
31 22 0:31 / /with\\040space rw shared:7 - tmpfs tmpfs rw
32 30 0:32 / /private/slave rw master:7 - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("source", "propagation", "accepted"),
    [
        ("/home", "rshared", True), ("/private", "rprivate", True), ("/private", "rshared", False),
        ("/private/x", "rslave", False), ("/privateer", "rslave", True), ("/with space/x", "shared", True),
        ("/private/slave", "rshared", False),
    ],
)  # fmt: skip
def test_shared_mounts_need_a_shared_source(source: str, propagation: str, accepted: bool) -> None:
    step = MountStep("", source, "/x", propagation=propagation)
    if accepted:
        mounts.require_propagation((step,), MOUNTINFO)
    else:
        with pytest.raises(UsageError, match="shared") as caught:
            mounts.require_propagation((step,), MOUNTINFO)
        assert "--make-shared" in caught.value.hint


def test_overlay_options_escape_what_parts_them() -> None:
    assert rootfs.options(("a:b", "c,d", "e\\f"), "/u,p", "/w:k") == (
        "lowerdir=a\\:b:c\\,d:e\\\\f,upperdir=/u\\,p,workdir=/w:k"
    )
