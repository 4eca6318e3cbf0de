"""Published ports of every type, in network namespaces of the test's own: this host, its loopback, and an outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.kernels import cache
from tests.conformance.types import find_obstacle
from tests.conftest import remove_all, require_program
from tests.e2e.command import Cli
from tests.e2e.processes import below, supervisors

SERVE = "mkdir -p /www; echo hello from $(hostname) > /www/index.html; httpd -f -v -p 80 -h /www"
HOST4, HOST6 = "198.51.100.1", "2001:db8:5::1"
Prefix = tuple[str, ...]


def run_in(prefix: Prefix, *argv: str) -> str:
    return subprocess.run([*prefix, *argv], capture_output=True, text=True, check=False).stdout


AT_MOST_S = 180.0
"""How long anything may take that will come: on a busy host a software KVM takes its time. Nothing waits so long for what is
not to come."""


def fetch(prefix: Prefix, url: str, *, within_s: float = AT_MOST_S) -> str:
    """What HTTP answers, once it does; "" when it does not within the time."""
    deadline = time.monotonic() + within_s
    while True:
        found = run_in(prefix, "curl", "-g", "-s", "-m", "20" if within_s else "3", url)
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.fixture
def outside(network_namespace: Prefix) -> Prefix:
    """The world beyond the host, with IPv6 between them."""
    require_program("curl")
    inside = network_namespace[1].rpartition("/")[2]
    other = inside.replace("-in-", "-out-")
    for words in (
        f"-n {inside} address add {HOST6}/64 dev inner nodad",
        f"-n {other} address add 2001:db8:5::2/64 dev outer nodad",
        f"-n {inside} -6 route add default via 2001:db8:5::2",
        f"-n {other} link set lo up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    return ("nsenter", f"--net=/run/netns/{other}")


@pytest.fixture
def wired(cli: Cli, network_namespace: Prefix) -> Iterator[Cli]:
    made = Cli(cli.root, prefix=network_namespace)
    yield made
    remove_all(made)  # while its network namespace is there
    made("prune", "-f")


def serve(cli: Cli, *flags: str, name: str = "web") -> str:
    machine = cli.ok("run", "-d", "--name", name, *flags, "busybox", "sh", "-c", SERVE, timeout_s=2 * AT_MOST_S).strip()
    await_server(cli, machine)
    return machine


def await_server(cli: Cli, machine: str) -> None:
    """Until what it serves can be had inside: from then on only the way there is tested."""
    asks = "until wget -q -O /dev/null http://127.0.0.1/; do sleep 0.2; done"
    cli.ok("exec", machine, "sh", "-c", asks, timeout_s=AT_MOST_S)


def need(type_: str, *flags: str) -> tuple[str, ...]:
    obstacle = find_obstacle(type_) if type_ != "container" else ""
    if obstacle:
        pytest.skip(f"needs machines of type {type_}: {obstacle}")
    if "user" in flags:
        require_program("passt")
    return ("--type", type_, *flags)


@pytest.mark.parametrize(
    "kind",
    [("container",), ("emulated",), ("emulated", "--network", "user"), ("kvm",)],
    ids=lambda kind: "-".join(kind),
)
def test_a_port_is_fetched_from_everywhere(
    wired: Cli, network_namespace: Prefix, outside: Prefix, kind: tuple[str, ...]
) -> None:
    machine = serve(
        wired, *need(*kind), "-p", "8080:80", "-p", "0.0.0.0:9000:80", "-p", "[::]:9001:80", "-p", "80", "--hostname", "me"
    )  # fmt: skip
    expected = "hello from me\n"
    free = wired.json("port", machine, "--json")[3]["host_port"]
    urls = ["127.0.0.1:8080", "[::1]:8080", "127.0.0.1:9000", f"{HOST4}:9000", f"[{HOST6}]:9001", "[::1]:9001"]
    for url in [*urls, f"127.0.0.1:{free}"]:
        assert fetch(network_namespace, f"http://{url}/") == expected, url
    for url in (f"{HOST4}:9000", f"[{HOST6}]:9001"):
        assert fetch(outside, f"http://{url}/") == expected, url
    for url in (f"{HOST4}:8080", f"[{HOST6}]:8080", f"{HOST4}:{free}", f"{HOST4}:9001"):
        assert fetch(outside, f"http://{url}/", within_s=0) == "", f"{url} is published on loopback alone"
    if "user" not in kind:
        logged = wired.ok("logs", machine) + wired("logs", machine).err
        assert "198.51.100.2]" in logged and "[2001:db8:5::2]" in logged, "who comes from outside keeps the address"
        other = wired.ok("run", "-d", "busybox", "sleep", "600").strip()
        asks = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {HOST4} 9000"
        assert expected in wired.ok("exec", other, "sh", "-c", asks), "a neighbour, too, by the host's address"
        asks = asks.replace("9000", "8080")
        assert wired("exec", other, "sh", "-c", asks).out == "", "loopback's are this host's alone"
    assert wired.ok("port", machine, "80").splitlines()[:3] == ["127.0.0.1:8080", "0.0.0.0:9000", "[::]:9001"]
    assert "127.0.0.1:8080->80/tcp, 0.0.0.0:9000->80/tcp" in wired.ok("ps", "--no-trunc")
    wired.ok("restart", "-t", "1", machine, timeout_s=2 * AT_MOST_S)
    await_server(wired, machine)
    assert fetch(network_namespace, f"http://127.0.0.1:{free}/") == expected, "a restart keeps the port that was chosen"
    wired.ok("stop", "-t", "1", machine, timeout_s=AT_MOST_S)
    assert wired.ok("port", machine) == ""
    assert fetch(network_namespace, "http://127.0.0.1:8080/", within_s=0) == ""


def test_a_port_in_use_is_refused_before_anything_starts(wired: Cli, network_namespace: Prefix) -> None:
    serve(wired, "-p", "8080:80")
    refused = wired("run", "-d", "--name", "second", "-p", "8081:80", "-p", "8080:80", "busybox", "true")
    assert refused.code == 125
    assert "the port 127.0.0.1:8080/tcp is in use by machine 'web'" in refused.err
    assert "hint: publish another one" in refused.err
    assert "8081" not in run_in(network_namespace, "ss", "-tln"), "none is held after a refusal"
    script = "import socket, time; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('0.0.0.0', 5353)); print(flush=True); time.sleep(60)"
    other = subprocess.Popen([*network_namespace, "/usr/bin/python3", "-c", script], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        refused = wired("run", "--rm", "-p", "5353:53/udp", "busybox", "true")
        assert f"127.0.0.1:5353/udp is in use by python3 (pid {other.pid})" in refused.err
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    wired.ok("run", "--rm", "-p", "5353:53/udp", "busybox", "true")
    refused = wired("run", "--rm", "-p", "192.0.2.77:80:80", "busybox", "true")
    assert "this host has no such address" in refused.err


def test_kill_9_of_the_supervisor_frees_the_ports(wired: Cli, network_namespace: Prefix) -> None:
    machine = serve(wired, "-p", "8080:80")
    assert fetch(network_namespace, "http://127.0.0.1:8080/")  # the relay's process is there by now
    (pid,) = supervisors(wired.root, machine)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while "8080" in run_in(network_namespace, "ss", "-tln"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    wired.ok("start", machine)
    assert fetch(network_namespace, "http://127.0.0.1:8080/")


def test_a_killed_relay_is_made_again(wired: Cli, network_namespace: Prefix) -> None:
    machine = serve(wired, "-p", "8080:80")
    assert fetch(network_namespace, "http://127.0.0.1:8080/")
    (pid,) = supervisors(wired.root, machine)
    relays = [child for child in below([pid]) if _user(child) == 65534]
    assert len(relays) == 1
    os.kill(relays[0], signal.SIGKILL)
    assert fetch(network_namespace, "http://127.0.0.1:8080/")
    assert wired.json("inspect", machine)[0]["state"]["phase"] == "running"


def _user(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def test_the_port_is_held_while_the_machine_waits_for_its_restart(wired: Cli, network_namespace: Prefix) -> None:
    wired.ok("run", "-d", "--name", "again", "--restart", "always", "-p", "8080:80", "busybox", "sleep", "0.3")
    for _ in range(20):
        assert "127.0.0.1:8080" in run_in(network_namespace, "ss", "-tln")
        time.sleep(0.05)
    wired.ok("rm", "-f", "again")
    assert "127.0.0.1:8080" not in run_in(network_namespace, "ss", "-tln")


def test_ranges_and_all_that_the_image_exposes(wired: Cli, network_namespace: Prefix) -> None:
    wired.ok("run", "--name", "base", "busybox", "true")
    wired.ok("commit", "--change", "EXPOSE 80", "--change", "EXPOSE 53/udp", "base", "exposing:1")
    flags = ("-P", "-p", "8000-8003:8000-8003")
    machine = wired.ok("run", "-d", *flags, "exposing:1", "sh", "-c", SERVE).strip()
    ports = wired.json("port", machine, "--json")
    assert [(port["host_port"], port["guest_port"]) for port in ports[:4]] == [(8000 + n, 8000 + n) for n in range(4)]
    assert {(port["guest_port"], port["protocol"]) for port in ports[4:]} == {(80, "tcp"), (53, "udp")}
    assert "127.0.0.1:8000-8003->8000-8003/tcp" in wired.ok("ps", "--no-trunc")
    http = next(port["host_port"] for port in ports[4:] if port["protocol"] == "tcp")
    assert fetch(network_namespace, f"http://127.0.0.1:{http}/").startswith("hello")


def test_datagrams(wired: Cli, network_namespace: Prefix, outside: Prefix) -> None:
    machine = wired.ok("run", "-d", "-p", "0.0.0.0:5353:53/udp", "busybox", "sleep", "600").strip()
    pid = wired.json("inspect", machine)[0]["state"]["pid"]  # the server runs in its network: busybox has none for UDP
    answer = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 53))\nwhile True: s.sendto(*s.recvfrom(100))"
    server = subprocess.Popen(["nsenter", "-t", str(pid), "-n", "/usr/bin/python3", "-c", answer])
    try:
        _exchange_datagrams(network_namespace, outside)
    finally:
        server.kill()
        server.wait()


def _exchange_datagrams(network_namespace: Prefix, outside: Prefix) -> None:
    for prefix, address in ((network_namespace, "127.0.0.1"), (network_namespace, HOST4), (outside, HOST4)):
        script = (
            "import socket, sys, time\ns = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(0.2)\n"
            f"s.connect(('{address}', 5353))\n"
            "for _ in range(25):\n  s.send(b'ping')\n  try: print(s.recv(100).decode()); break\n  except OSError: time.sleep(0.1)"
        )
        assert run_in(prefix, "/usr/bin/python3", "-c", script) == "ping\n", (prefix, address)


ASK = """
import socket, sys, time
s = socket.socket(type=socket.SOCK_DGRAM); s.bind(("", 7000)); s.settimeout(0.2)
deadline = time.monotonic() + float(sys.argv[1])
while time.monotonic() < deadline:
    try:
        s.sendto(b"who", (sys.argv[2], 5353)); print(s.recv(100).decode()); break
    except OSError: time.sleep(0.1)
"""


def test_datagrams_from_one_port_follow_the_machine(wired: Cli, outside: Prefix) -> None:
    """A client that goes on asking from its port, as a flow of which connection tracking knows where it goes."""

    def ask(within_s: float) -> str:
        return run_in(outside, "/usr/bin/python3", "-c", ASK, str(within_s), HOST4)

    assert ask(0.5) == ""  # nobody is there; from now on connection tracking knows of it
    for name in ("one", "two"):
        machine = wired.ok("run", "-d", "--name", name, "-p", "0.0.0.0:5353:53/udp", "busybox", "sleep", "600").strip()
        pid = wired.json("inspect", machine)[0]["state"]["pid"]
        answer = f"import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 53))\nwhile True: s.sendto(b'{name}', s.recvfrom(100)[1])"
        server = subprocess.Popen(["nsenter", "-t", str(pid), "-n", "/usr/bin/python3", "-c", answer])
        try:
            assert ask(20) == f"{name}\n"
        finally:
            server.kill()
            server.wait()
        wired.ok("rm", "-f", machine)


def test_ports_follow_the_machine_to_another_network(wired: Cli, network_namespace: Prefix, outside: Prefix) -> None:
    for name in ("first", "second"):
        wired.ok("network", "create", name)
    machine = serve(wired, "--network", "first", "-p", "8080:80", "-p", "0.0.0.0:9000:80", "--hostname", "me")
    assert fetch(network_namespace, "http://127.0.0.1:8080/") == "hello from me\n"
    wired.ok("network", "connect", "second", machine)
    wired.ok("network", "disconnect", "first", machine)
    assert fetch(network_namespace, "http://127.0.0.1:8080/") == "hello from me\n"
    assert fetch(network_namespace, f"http://{HOST4}:9000/") == "hello from me\n"
    wired.ok("rm", "-f", machine)
    wired.ok("network", "rm", "first", "second")


def test_bad_requests(wired: Cli) -> None:
    for flags, said in (
        (("-p", "0:80"), "not a port"),
        (("-p", "80:80/sctp"), "unknown protocol 'sctp'"),
        (("-p", "8000-8002:80-81"), "3 ports of the host for 2 of the machine"),
        (("-p", "8080:80", "-p", "8080:81"), "is to lead to 80 and to 81"),
        (("-p", "host:8080:80"), "not an IP address"),
        (("-p", "8080:80", "--network", "none"), "no meaning with --network none"),
        (("--network", "user",), "a user-mode network is for virtual machines"),
    ):  # fmt: skip
        ran = wired("run", "--rm", *flags, "busybox", "true")
        assert ran.code == 125, flags
        assert said in ran.err and "hint" in ran.err, (flags, ran.err)
    assert wired.machine_ids() == []
    machine = wired.ok("create", "--name", "still", "-p", "8080:80", "busybox", "true").strip()
    assert wired("port", machine, "81").code == 1
    assert wired("port", machine, "x").code == 2


@pytest.fixture
def plain_user(tmp_path_factory: pytest.TempPathFactory, network_namespace: Prefix) -> Iterator[Cli]:
    """Another user, with a store and a kernel of that user's own."""
    need("emulated")
    require_program("setpriv")
    home = Path("/tmp", f"nagayatest-{os.getpid()}")
    home.mkdir()
    try:
        kernels = Path(cache.get_kernel().path).parent
        shutil.copytree(kernels, home / "cache/nagaya/kernels" / kernels.name)
        subprocess.run(["chown", "-R", "12345:12345", str(home)], check=True)
        as_user = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups")
        env = {
            "HOME": str(home), "XDG_CACHE_HOME": f"{home}/cache", "NAGAYA_RUN_DIR": f"{home}/run",
            "XDG_RUNTIME_DIR": f"{home}/run",
        }  # fmt: skip
        cli = Cli(f"{home}/store", prefix=(*network_namespace, *as_user), env=env)
        ran = cli("pull", "busybox")
        if ran.code:
            pytest.skip(f"needs an image that another user can make: {ran.err}")
        yield cli
        remove_all(cli)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("network", ["passt", "slirp"])
def test_a_plain_users_port(plain_user: Cli, network_namespace: Prefix, outside: Prefix, network: str) -> None:
    if network == "passt":
        require_program("passt")
    else:  # where passt is not installed: in a mount namespace of its own a program that cannot be executed is none
        hide = "for f in /usr/bin/passt /usr/local/bin/passt; do [ -e $f ] && mount --bind /dev/null $f; done; "
        hidden = ("unshare", "-m", "sh", "-c", hide + 'exec "$@"', "sh")
        plain_user.prefix = (*hidden, *plain_user.prefix)
    serve(plain_user, "--type", "emulated", "-p", "8080:80", "-p", "0.0.0.0:9000:80", "--hostname", "mine")
    for prefix, url in (
        (network_namespace, "127.0.0.1:8080"), (network_namespace, "[::1]:8080"), (outside, f"{HOST4}:9000"),
    ):  # fmt: skip
        assert fetch(prefix, f"http://{url}/") == "hello from mine\n", url
    refused = plain_user("run", "--rm", "--type", "emulated", "-p", "70:80", "busybox", "true")
    assert "only root may take" in refused.err
