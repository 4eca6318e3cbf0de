"""Networks: throughput between containers, what a network costs a start, and what a virtual machine's card moves.

All of it in network namespaces of its own making: the host's own network is neither used nor changed.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benches.apart import run_apart
from benches.measure import Check, Sample, command, report, take_turns
from benches.stores import Stores, open_stores
from nagaya.engines import open_engine
from nagaya.errors import NagayaError

IPERF_S = "2"
MACHINES = int(os.environ.get("BENCH_MACHINES", "200"))
BULK_BYTES = 64 << 20


def main(rounds: int) -> bool:
    return run_apart(lambda: _main(rounds))


def _main(rounds: int) -> bool:
    with open_stores() as stores:
        kept = _bench_throughput(stores, max(3, rounds // 4))
        kept = _bench_set_up(stores, rounds) and kept
        kept = _bench_many(stores) and kept
        for type_ in ("kvm", "emulated"):
            _bench_virtual(stores, type_)
        return kept


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def _start(stores: Stores, *flags: str, argv: tuple[str, ...] = ("sleep", "3600")) -> str:
    return _output([*stores.nagaya, "run", "-d", *flags, "busybox", *argv]).strip()


def _remove(stores: Stores, *machines: str) -> None:
    subprocess.run([*stores.nagaya, "rm", "-f", *machines], stdout=subprocess.DEVNULL, check=True)


def _inspect(stores: Stores, machine: str) -> dict[str, object]:
    state: dict[str, object] = json.loads(_output([*stores.nagaya, "inspect", machine]))[0]["state"]
    return state


# -- containers


@contextmanager
def _hand_made() -> Iterator[tuple[list[str], list[str], str]]:
    """Two namespaces on a bridge: words to put before a command in each, and the second's address."""
    pids, keepers = [], []
    for _ in range(2):
        keeper = subprocess.Popen(["unshare", "-n", "sleep", "3600"])
        keepers.append(keeper)
        while os.stat(f"/proc/{keeper.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            time.sleep(0.01)
        pids.append(keeper.pid)
    try:
        script = "ip link add hand type bridge; ip link set hand up\n"
        for number, pid in enumerate(pids):
            inside = f"nsenter -t {pid} -n ip"
            script += f"ip link add hand{number} type veth peer name eth0 netns {pid}\n"
            script += f"ip link set hand{number} master hand; ip link set hand{number} up\n"
            script += f"{inside} addr add 192.168.77.{number + 1}/24 dev eth0; {inside} link set eth0 up\n"
        subprocess.run(["sh", "-e", "-c", script], check=True)
        yield ["nsenter", "-t", str(pids[0]), "-n"], ["nsenter", "-t", str(pids[1]), "-n"], "192.168.77.2"
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()
        subprocess.run(["ip", "link", "del", "hand"], check=False)


def _iperf(client: list[str], server: list[str], address: str) -> float:
    """Gbit/s of TCP from one to the other."""
    listening = subprocess.Popen([*server, "iperf3", "-s", "-1", "-p", "5201"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            done = subprocess.run(
                [*client, "iperf3", "-J", "-t", IPERF_S, "-c", address, "-p", "5201"],
                capture_output=True,
                text=True,
                check=False,
            )
            found = json.loads(done.stdout or "{}").get("end", {}).get("sum_received")  # without it nobody listens yet
            if found:
                return float(found["bits_per_second"]) / 1e9
            time.sleep(0.02)
        raise RuntimeError(f"iperf3: {done.stdout[-500:]}")
    finally:
        listening.kill()
        listening.wait()


def _bench_throughput(stores: Stores, rounds: int) -> bool:
    first, second = _start(stores), _start(stores)
    states = [_inspect(stores, machine) for machine in (first, second)]
    ours = [["nsenter", "-t", str(state["pid"]), "-n"] for state in states]
    address = str(states[1]["address"])
    results: dict[str, list[float]] = {"hand-made": [], "nagaya": []}
    try:
        with _hand_made() as (client, server, hand_address):
            for number in range(rounds):
                turns = [("hand-made", client, server, hand_address), ("nagaya", ours[0], ours[1], address)]
                for name, one, other, where in turns if number % 2 else turns[::-1]:
                    results[name].append(_iperf(one, other, where))
    finally:
        _remove(stores, first, second)
    medians = {name: statistics.median(found) for name, found in results.items()}
    print("\n### network: TCP from container to container on one bridge (iperf3, one stream)\n")
    print("| what | median Gbit/s | all |\n|---|---:|---|")
    for name, found in results.items():
        print(f"| {name} | {medians[name]:.2f} | {', '.join(f'{value:.2f}' for value in sorted(found))} |")
    return _check(Check("hand-made veth and bridge to ours", medians["hand-made"] / medians["nagaya"], 1 / 0.95))


def _check(check: Check) -> bool:
    print(f"\n- {'PASS' if check.passed else 'FAIL'}: {check.text}: {check.value:.2f} (at most {check.limit:.2f})")
    return check.passed


def _bench_set_up(stores: Stores, rounds: int) -> bool:
    """A network that is up already, as for every machine but the first."""
    run = [*stores.nagaya, "run", "--rm"]
    other = _start(stores)
    try:
        samples = take_turns(
            {
                "run --network none": command([*run, "--network", "none", "busybox", "true"]),
                "run": command([*run, "busybox", "true"]),
                "run -p 80": command([*run, "-p", "80", "busybox", "true"]),
            },
            rounds=rounds,
        )
    finally:
        _remove(stores, other)
    cost = samples[1].median - samples[0].median
    return report(
        "network: what it adds to a container's start and end", samples, [Check("set-up and tear-down, ms", cost, 25)]
    )


def _bench_many(stores: Stores) -> bool:
    """Starts beside others, in one network: the second to the sixth against the last five."""
    start = [*stores.nagaya, "run", "-d", "busybox", "sleep", "3600"]
    times, machines = [], []
    try:
        for _ in range(MACHINES):
            began = time.perf_counter()
            machines.append(_output(start).strip())
            times.append((time.perf_counter() - began) * 1e3)
    finally:
        _remove(stores, *machines)
    early, late = tuple(times[1:11]), tuple(times[-10:])
    samples = [Sample("start of the 2nd to the 11th", early), Sample(f"start of the last ten of {MACHINES}", late)]
    # The median of ten starts on a busy machine is good to some 15 %.
    checks = [Check("the last ones' to the first ones'", samples[1].median / samples[0].median, 1.15)]
    return report(f"network: {MACHINES} containers on one bridge", samples, checks)


# -- virtual machines


def _bench_virtual(stores: Stores, type_: str) -> None:
    """Bulk and round trip between a guest and its host over a tap device, and who worked meanwhile."""
    try:
        open_engine(type_).check_host()
    except NagayaError as error:
        print(f"\nnetwork, {type_}: left out: {error.message}")
        return
    size = BULK_BYTES
    script = (
        f"nc -ll -p 5001 -e dd if=/dev/zero bs=64k count={size >> 16} & nc -ll -p 5002 -e dd of=/dev/null bs=64k & wait"
    )
    machine = _start(stores, "--type", type_, "-m", "256m", "--allow-host", argv=("sh", "-c", script))
    try:
        address = str(_inspect(stores, machine)["address"])
        _wait_for(address)
        link = f"ngy{machine[:10]}"
        print(f"\n### network, {type_}: a guest and its host over a tap device\n")
        print(
            "| what | result | frames | bytes a frame | CPU time of the VMM | in the guest, the VMM, the host's kernel |\n|---|---:|---:|---:|---:|---|"
        )
        for name, call in (
            ("guest to host", lambda: _receive(address)), ("host to guest", lambda: _send(address, size)),
        ):  # fmt: skip
            before, cpu, began = _counters(link), _cpu_s(stores, machine), time.perf_counter()
            call()
            took = time.perf_counter() - began
            frames, moved = (now - then for now, then in zip(_counters(link), before, strict=True))
            spent = [now - then for now, then in zip(_cpu_s(stores, machine), cpu, strict=True)]
            print(
                f"| {name}, {size >> 20} MiB | {size / took / 1e6:.0f} MB/s | {frames} | {moved // max(1, frames)} "
                f"| {sum(spent):.2f} of {took:.2f} s | {', '.join(f'{value:.2f}' for value in spent)} |"
            )
        print(f"| round trip (ping) | {_ping_ms(address):.2f} ms | | | | |")
    finally:
        _remove(stores, machine)


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((address, 5001), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _receive(address: str) -> None:
    with socket.create_connection((address, 5001), timeout=120) as guest:
        while guest.recv(1 << 20):
            pass


def _send(address: str, size: int) -> None:
    """Until the guest has read it all: its end of the connection is closed then."""
    with socket.create_connection((address, 5002), timeout=120) as guest:
        guest.sendall(bytes(size))
        guest.shutdown(socket.SHUT_WR)
        while guest.recv(1 << 16):
            pass


def _counters(name: str) -> tuple[int, int]:
    """(frames, bytes) that a link has moved, both ways."""
    stats = json.loads(_output(["ip", "-j", "-s", "link", "show", name]))[0]["stats64"]
    return stats["rx"]["packets"] + stats["tx"]["packets"], stats["rx"]["bytes"] + stats["tx"]["bytes"]


def _cpu_s(stores: Stores, machine: str) -> tuple[float, float, float]:
    """CPU time of a machine's processes: in the guest (of KVM: QEMU's TCG is a program like others), outside, in the kernel."""
    from tests.e2e.processes import below, supervisors

    guest = user = system = 0
    for pid in below(supervisors(f"{stores.directory}/nagaya", machine)):
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        guest += int(fields[40])
        user += int(fields[11]) - int(fields[40])  # the guest's time is counted as the program's too (proc_pid_stat(5))
        system += int(fields[12])
    tick = os.sysconf("SC_CLK_TCK")
    return guest / tick, user / tick, system / tick


def _ping_ms(address: str) -> float:
    lines = _output(["busybox", "ping", "-c", "10", "-q", address]).splitlines()
    return float(lines[-1].split("=")[1].split("/")[1])
