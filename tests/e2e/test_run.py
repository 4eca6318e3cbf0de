"""`nagaya run`: statuses, streams, and every flag seen from inside the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.command import Cli


def test_the_status_is_the_programs_own(cli: Cli) -> None:
    """Of `run`, `exec` and `start -a`. (test_library.py has all 256.)"""
    cli.start(flags=("--name", "box"))
    for status in (0, 1, 2, 70, 125, 126, 127, 128, 137, 255):
        assert cli.run("sh", "-c", f"exit {status}").code == status
        assert cli("exec", "box", "sh", "-c", f"exit {status}").code == status
    cli.ok("create", "--network", "none", "--name", "seven", "busybox", "sh", "-c", "exit 7")
    assert cli("start", "-a", "seven").code == 7
    assert cli("wait", "seven").out == "7\n"


@pytest.mark.parametrize(("name", "number"), [("TERM", 15), ("KILL", 9), ("SEGV", 11), ("INT", 2), ("USR1", 10)])
def test_a_signal_is_128_and_its_number(cli: Cli, name: str, number: int) -> None:
    assert cli.run("sh", "-c", f"kill -{name} $$").code == 128 + number


def test_what_cannot_run(cli: Cli) -> None:
    missing = cli.run("no-such-program")
    assert missing.code == 127
    assert missing.err.startswith("nagaya: ")
    assert "no-such-program" in missing.err
    assert cli.run("/etc/passwd").code == 126
    assert cli.run("/etc").code == 126
    failed = cli("run", "--rm", "--network", "none", "--no-such-flag", "busybox", "true")
    assert failed.code == 125
    assert cli.machines() == []


def test_standard_streams(cli: Cli) -> None:
    payload = os.urandom(3 << 20)
    code, out, err = cli.bytes("run", "--rm", "--network", "none", "-i", "busybox", "cat", input=payload)
    assert (code, err) == (0, b"")
    assert out == payload
    assert cli.run("cat", input="not passed on without -i\n") == (0, "", "")
    assert cli.run("sh", "-c", "echo out; echo err >&2") == (0, "out\n", "err\n")
    assert cli.run("head", "-n", "1", input="one\ntwo\n" * 100_000, flags=("-i",)).out == "one\n"


def test_input_ends_for_a_machine_that_is_restarted_too(cli: Cli) -> None:
    words = ("run", "-i", "--network", "none", "--restart", "on-failure:2", "busybox", "sh", "-c", "cat; exit 3")
    assert cli(*words, input="once\n") == (3, "once\n", "")


def test_a_reader_that_goes_away(cli: Cli) -> None:
    """`nagaya run … yes | head -1` ends, and the machine with it."""
    process = cli.popen("run", "--rm", "--network", "none", "busybox", "yes")
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    process.wait(20)
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    deadline = time.monotonic() + 10
    while cli.machines():
        assert time.monotonic() < deadline, cli.machines()


def test_environment(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "variables"
    file.write_text("# a comment\nFROM_FILE=a b\nBOTH=file\nFROM_HOST\n\n")
    cli.env["FROM_HOST"] = "host"
    cli.env["PASSED"] = "passed"
    flags = ("--env-file", str(file), "-e", "BOTH=flag", "-e", "PASSED", "--env", "EMPTY=", "-e", "NOT_SET_HERE")
    lines = cli.run("env", flags=flags).out.splitlines()
    assert {"FROM_FILE=a b", "BOTH=flag", "FROM_HOST=host", "PASSED=passed", "EMPTY="} <= set(lines)
    assert not [line for line in lines if line.startswith(("NOT_SET_HERE", "NAGAYA", "BOTH=file"))]
    assert [line for line in lines if line.startswith("PATH=")]
    assert "HOME=/root" in lines


def test_user_workdir_hostname_entrypoint(cli: Cli) -> None:
    script = "id -u; id -g; pwd; hostname"
    flags = ("-u", "4711:4712", "-w", "/made/for/it", "--hostname", "kura")
    assert cli.run("sh", "-c", script, flags=flags).out.split() == ["4711", "4712", "/made/for/it", "kura"]
    assert cli.run("ignored?", flags=("--entrypoint", "echo")).out == "ignored?\n"
    id_ = cli.start("hostname", flags=("--name", "named"))
    cli.ok("wait", "named")
    assert cli.ok("logs", "named").strip() == id_[:12]
    assert cli.run("cat", "/etc/hosts", flags=("--add-host", "db:192.0.2.7")).out.count("192.0.2.7\tdb") == 1
    assert (
        "nameserver 192.0.2.53"
        in cli.run("cat", "/etc/resolv.conf", flags=("--network", "host", "--dns", "192.0.2.53")).out
    )


def test_mounts(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("host\n")
    flags = (
        "-v", f"{tmp_path}:/rw", "-v", f"{tmp_path}:/ro:ro", "--mount", f"type=bind,source={tmp_path},target=/long,readonly",
        "--tmpfs", "/scratch:size=1m,mode=700", "-v", "kept:/kept", "--mount", "type=volume,source=kept,target=/again",
    )  # fmt: skip
    script = (
        "cat /ro/seen; echo made > /rw/made; touch /ro/x 2>&1; touch /long/x 2>&1; echo v > /kept/v; cat /again/v; "
        "stat -c %a /scratch; dd if=/dev/zero of=/scratch/x bs=1k count=2000 2>&1 | grep -o 'No space'"
    )
    ran = cli.run("sh", "-c", script, flags=flags)
    lines = ran.out.splitlines()
    assert lines[0] == "host"
    assert [line for line in lines if "Read-only" in line] == lines[1:3]
    assert lines[3:] == ["v", "700", "No space"]
    assert (tmp_path / "made").read_text() == "made\n"
    assert not (tmp_path / "x").exists()
    assert cli.ok("volume", "ls", "-q").split() == ["kept"]
    assert cli.run("cat", "/kept/v", flags=("-v", "kept:/kept")).out == "v\n"


def test_a_read_only_root(cli: Cli) -> None:
    ran = cli.run("sh", "-c", "touch /x; touch /tmp/x && echo tmp", flags=("--read-only", "--tmpfs", "/tmp"))
    assert "Read-only" in ran.err
    assert ran.out == "tmp\n"


def test_a_device(cli: Cli) -> None:
    """A device that was asked for can be used, and the same device otherwise neither is there nor can be made."""
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("needs /dev/loop-control")
    script = "test -c /dev/ctl && : < /dev/ctl && echo open"
    assert cli.run("sh", "-c", script, flags=("--device", "/dev/loop-control:/dev/ctl:r")).out == "open\n"
    ran = cli.run("sh", "-c", "ls /dev/loop-control; mknod /dev/ctl c 10 237 && : < /dev/ctl && echo open")
    assert ran.out == ""
    assert ran.code != 0


def _status(cli: Cli, *flags: str) -> dict[str, str]:
    out = cli.run("cat", "/proc/self/status", flags=flags).out
    return {name: value.strip() for name, _, value in (line.partition(":") for line in out.splitlines())}


def test_capabilities_and_security(cli: Cli) -> None:
    usual = _status(cli)
    assert usual["CapEff"] == usual["CapPrm"] == usual["CapBnd"] == "00000000a80425fb"  # Docker's and podman's default
    assert (usual["NoNewPrivs"], usual["Seccomp"]) == ("1", "2")
    assert _status(cli, "--cap-drop", "ALL")["CapBnd"] == "0000000000000000"
    assert int(_status(cli, "--cap-drop", "ALL", "--cap-add", "NET_ADMIN")["CapEff"], 16) == 1 << 12
    dropped = int(_status(cli, "--cap-drop", "chown", "--cap-add", "CAP_SYS_TIME")["CapEff"], 16)
    assert dropped == (0xA80425FB & ~1) | 1 << 25
    open_ = _status(cli, "--security-opt", "seccomp=unconfined", "--security-opt", "no-new-privileges=false")
    assert (open_["NoNewPrivs"], open_["Seccomp"]) == ("0", "0")
    assert int(_status(cli, "-u", "1000")["CapEff"], 16) == 0


def test_masked_paths(cli: Cli) -> None:
    script = "cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/printk"
    ran = cli.run("sh", "-c", script)
    assert ran.out.split() == ["0", "0"]
    assert "Read-only" in ran.err
    mounts = cli.run("cat", "/proc/mounts", flags=("--security-opt", "systempaths=unconfined")).out
    assert "/proc/timer_list" not in mounts
    assert "/proc/timer_list" in cli.run("cat", "/proc/mounts").out


def test_resource_limits_of_processes(cli: Cli) -> None:
    ran = cli.run(
        "sh", "-c", "ulimit -n; ulimit -Hn; ulimit -c", flags=("--ulimit", "nofile=100:200", "--ulimit", "core=0")
    )
    assert ran.out.split() == ["100", "200", "0"]
    assert ran.err == ""


def test_a_limit_that_this_host_forbids_is_a_warning(cli: Cli) -> None:
    """Without CAP_SYS_RESOURCE a hard limit cannot be raised: the program runs, with as much as there is."""
    prefix = ("prlimit", "--nofile=2048:2048", "setpriv", "--bounding-set=-sys_resource")
    poor = Cli(cli.root, prefix=prefix)
    ran = poor.run("sh", "-c", "ulimit -n", flags=("--ulimit", "nofile=4096:4096"))
    assert (ran.code, ran.out) == (0, "2048\n"), ran
    assert "nofile" in ran.err
    assert ran.err.startswith("nagaya: warning: ") or ran.err.lower().startswith("warning")


def test_kernel_parameters(cli: Cli) -> None:
    flags = ("--sysctl", "net.ipv4.ip_default_ttl=33", "--sysctl", "kernel.msgmax=4321")
    script = "cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/msgmax"
    assert cli.run("sh", "-c", script, flags=flags).out.split() == ["33", "4321"]
    refused = cli.run("true", flags=("--sysctl", "kernel.panic=1"))
    assert refused.code == 125
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text().strip() != "33"


@pytest.mark.parametrize("flags", [(), ("--init=false",)])
def test_who_is_process_1(cli: Cli, flags: tuple[str, ...]) -> None:
    ran = cli.run("sh", "-c", "echo $$; exit 3", flags=flags)
    assert ran.code == 3
    assert (ran.out == "1\n") == bool(flags)


def test_a_user_namespace(cli: Cli, tmp_path: Path) -> None:
    script = "id -u; cut -c1-40 /proc/self/uid_map; touch /owned; stat -c %u /owned; readlink /proc/self/ns/user"
    ran = cli.run("sh", "-c", script, flags=("--userns", "auto"))
    words = ran.out.split()
    assert ran.code == 0, ran
    assert (words[0], words[1], words[-2]) == ("0", "0", "0")
    assert int(words[2]) > 65535
    assert words[-1] != os.readlink("/proc/self/ns/user")
    assert cli.run("readlink", "/proc/self/ns/user").out.strip() == os.readlink("/proc/self/ns/user")


def test_limits(cli: Cli) -> None:
    flags = ("--memory", "48m", "--pids-limit", "16", "--cpus", "0.5", "--cpuset-cpus", "0", "--name", "small")
    cli.start(flags=flags)
    limits = cli.json("inspect", "small")[0]["limits"]
    assert (limits["memory_bytes"], limits["pids"], limits["cpus_milli"], limits["cpuset_cpus"]) == (
        48 << 20,
        16,
        500,
        "0",
    )
    assert cli.ok("exec", "small", "sh", "-c", "grep Cpus_allowed_list /proc/self/status | tr -dc 0-9-") == "0"
    forks = cli("exec", "small", "sh", "-c", "for i in $(seq 40); do sleep 3 & done; wait")
    assert "fork" in forks.err
    eater = cli("exec", "small", "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
    assert eater.code == 137
    killed = cli("run", "--network", "none", "-m", "32m", "--name", "eater", "busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=200M")  # fmt: skip
    assert killed.code == 137
    assert cli.json("inspect", "eater")[0]["state"]["oom_killed"] is True


def test_namespaces_are_its_own(cli: Cli) -> None:
    kinds = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
    out = cli.run("sh", "-c", "".join(f"readlink /proc/self/ns/{kind};" for kind in kinds)).out.split()
    assert len(out) == len(kinds)
    for kind, inside in zip(kinds, out, strict=True):
        assert inside != os.readlink(f"/proc/self/ns/{kind}"), kind
    assert cli.run("ls", "/sys/class/net").out.split() == ["lo"]
    host = cli("run", "--rm", "--network", "host", "busybox", "readlink", "/proc/self/ns/net")
    assert host.out.strip() == os.readlink("/proc/self/ns/net")


def test_signals_are_passed_on(cli: Cli) -> None:
    script = "trap 'echo got; exit 9' TERM; echo ready; while true; do sleep 0.05; done"
    process = cli.popen("run", "--rm", "--network", "none", "busybox", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (9, b"got\n", b"")


def test_run_removes_when_told_to_and_keeps_when_not(cli: Cli, tmp_path: Path) -> None:
    cidfile = tmp_path / "cid"
    assert cli("run", "--network", "none", "--name", "kept", "--cidfile", str(cidfile), "busybox", "false").code == 1
    (kept,) = cli.machines()
    assert (kept["name"], kept["state"], kept["exit_code"]) == ("kept", "exited", 1)
    assert cidfile.read_text().strip() == kept["id"]
    assert cli.run("false").code == 1
    assert len(cli.machines()) == 1


def test_the_default_bridge_reaches_out(own_cli: Cli, network_namespace: tuple[str, ...]) -> None:
    """Inside a network namespace of the test's own: the bridge, an address, the gateway, and the world behind NAT."""
    wired = Cli(own_cli.root, prefix=network_namespace)
    ran = wired(
        "run", "--rm", "busybox", "sh", "-c", "ip -4 address show eth0; ping -c 1 -W 3 198.51.100.2; ls /sys/class/net"
    )
    assert ran.code == 0, ran
    assert "1 packets received" in ran.out
    first, second = (wired.ok("run", "-d", "busybox", "sleep", "600").strip() for _ in range(2))
    address = wired.ok("inspect", "--format", "{{.State.Address}}", first).strip().partition("/")[0]
    assert wired("exec", second, "ping", "-c", "1", "-W", "3", address).code == 0
    subprocess.run([*network_namespace, "busybox", "ping", "-c", "1", "-W", "3", address], check=True, stdout=-3)
    wired.ok("rm", "-f", first, second)
    links = subprocess.run([*network_namespace, "ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "ngy" not in links
