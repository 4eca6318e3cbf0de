"""Networks of one's own, from the command line, in a network namespace that each test makes: nothing reaches the host's."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

import pytest

from tests.conftest import remove_all
from tests.e2e.command import Cli
from tests.e2e.processes import supervisors

MANY = int(os.environ.get("NAGAYA_TEST_MACHINES", "40"))  # 200 for the whole of it: two minutes more


def outside(net: Cli, *argv: str, input: str = "", check: bool = True) -> str:
    """A program in the test's network namespace, as the host's own."""
    done = subprocess.run([*net.prefix, *argv], input=input, capture_output=True, text=True, check=False, timeout=30)
    assert not check or done.returncode == 0, (argv, done)
    return done.stdout


def start(net: Cli, name: str, *flags: str, program: tuple[str, ...] = ("sleep", "600")) -> str:
    return net.ok("run", "-d", "--name", name, *flags, "busybox", *program).strip()


def member(net: Cli, network: str, name: str) -> dict[str, str]:
    (found,) = net.json("network", "inspect", network)
    return next(one for one in found["machines"] if one["machine"] == name)


def can_ping(net: Cli, machine: str, where: str) -> bool:
    return net("exec", machine, "ping", "-c", "1", "-W", "1", where).code == 0


def ruleset(net: Cli) -> str:
    """All of nft's tables, without the counters' and handles' noise, lines of sets sorted."""
    tables = json.loads(outside(net, "nft", "-j", "list", "ruleset"))["nftables"]
    for entry in tables:
        for thing in entry.values():
            thing.pop("handle", None)
            if isinstance(thing, dict) and isinstance(thing.get("elem"), list):
                thing["elem"] = sorted(map(json.dumps, thing["elem"]))
    return json.dumps(sorted(map(json.dumps, tables)))


# -- names


def test_machines_find_each_other_by_name_alias_and_host_name(net: Cli) -> None:
    start(net, "web", program=("httpd", "-f", "-p", "80", "-h", "/etc"))
    start(net, "db", "--network-alias", "store", "--hostname", "cellar")
    for name in ("web", "store", "cellar", "host.nagaya.internal"):
        for family in ("-4", "-6"):
            assert net("exec", "db", "ping", family, "-c", "1", "-W", "2", name).code == 0, (name, family)
    assert "root:" in net.ok("exec", "db", "wget", "-q", "-O", "-", "http://web/passwd")
    assert net("exec", "db", "nslookup", "nobody-has-this-name").code != 0
    net.ok("rm", "-f", "web")
    assert net("exec", "db", "nslookup", "web").code != 0  # forgotten at once


def test_a_killed_name_server_is_back_with_the_next_command(net: Cli) -> None:
    start(net, "web")
    start(net, "db")
    (found,) = net.json("network", "inspect", "nagaya0")
    pid = int(open(f"/run/nagaya-names/{found['bridge']}/pid").read())
    os.kill(pid, signal.SIGKILL)
    assert not can_ping(net, "db", "web")
    ran = net("network", "ls")
    assert ran.code == 0 and "name server of network 'nagaya0' was gone" in ran.err
    assert can_ping(net, "db", "web")
    os.kill(int(open(f"/run/nagaya-names/{found['bridge']}/pid").read()), signal.SIGKILL)
    start(net, "third")  # a start mends it too
    assert can_ping(net, "third", "web") and can_ping(net, "web", "third")
    net.ok("rm", "-f", "web", "db", "third")
    assert not os.path.exists(f"/run/nagaya-names/{found['bridge']}")


def test_dhcp_gives_what_the_store_has_given(net: Cli) -> None:
    """As a virtual machine would ask that knows nothing of us."""
    start(net, "asker", "--cap-add", "NET_ADMIN")
    mine = member(net, "nagaya0", "asker")
    script = '#!/bin/sh\n[ "$1" = bound ] && echo $ip/$mask $router $dns > /tmp/lease\nexit 0\n'
    net.ok("exec", "-i", "asker", "sh", "-c", "cat > /tmp/told; chmod +x /tmp/told", input=script)
    net.ok("exec", "asker", "ip", "address", "flush", "dev", "eth0", "scope", "global")
    ran = net("exec", "asker", "udhcpc", "-i", "eth0", "-n", "-q", "-t", "3", "-T", "1", "-s", "/tmp/told")
    assert ran.code == 0, ran
    (found,) = net.json("network", "inspect", "nagaya0")
    assert net.ok("exec", "asker", "cat", "/tmp/lease").split() == [f"{mine['address']}/16", *[found["gateway"]] * 2]


SOLICIT = """
import errno, socket, struct, sys, time
mac, wanted = bytes.fromhex(sys.argv[1].replace(":", "")), socket.inet_pton(socket.AF_INET6, sys.argv[2])
option = lambda number, value: struct.pack(">HH", number, len(value)) + value
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:  # RFC 8415
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    client.bind(("::", 546))
    client.settimeout(1)
    message = struct.pack(">I", 1 << 24 | 77) + option(1, b"\\0\\3\\0\\1" + mac) + option(3, bytes(4) + bytes(8))
    for _ in range(15):
        try:
            client.sendto(message, ("ff02::1:2", 547, 0, socket.if_nametoindex("eth0")))
            answer = client.recv(2048)
        except TimeoutError: continue
        except OSError as error:  # no address to send from: that of the link is still being looked for twice
            if error.errno != errno.EADDRNOTAVAIL: raise
            time.sleep(0.5)
            continue
        sys.exit(0 if answer[0] == 2 and option(5, wanted)[:2] + struct.pack(">H", 24) + wanted in answer else repr(answer))
sys.exit("no answer")
"""


def test_a_system_that_sets_itself_up_has_ipv6(net: Cli) -> None:
    """Router advertisements reach none but those; DHCPv6 gives what the store has given."""
    start(net, "plain")
    start(net, "asker")
    (found,) = net.json("network", "inspect", "nagaya0")
    mine = {name: member(net, "nagaya0", name) for name in ("plain", "asker")}
    table = found["bridge"].replace("-", "_")
    outside(net, "nft", f'add element bridge {table} advised {{ "{mine["asker"]["link"]}" }}')  # as a whole machine's
    pids = {machine["name"]: machine["pid"] for machine in net.machines()}
    enter = {name: ["nsenter", f"--net=/proc/{pid}/ns/net"] for name, pid in pids.items()}
    for name in mine:  # forget what was set up from outside
        script = (
            "echo 2 > /proc/sys/net/ipv6/conf/eth0/accept_ra; ip -6 address flush dev eth0 scope global; "
            "ip -6 route flush default; ip link set eth0 down; ip link set eth0 up"
        )
        subprocess.run([*enter[name], "sh", "-ec", script], check=True)
    deadline = time.monotonic() + 30
    while "default via fe80" not in (routes := net.ok("exec", "asker", "ip", "-6", "route")):
        assert time.monotonic() < deadline, routes
        time.sleep(0.1)
    assert "default" not in net.ok("exec", "plain", "ip", "-6", "route")
    assert "inet6 fd" not in net.ok("exec", "asker", "ip", "address"), "no address but by DHCPv6"
    asks = [*enter["asker"], "python3", "-c", SOLICIT, mine["asker"]["mac"], mine["asker"]["address6"]]
    done = subprocess.run(asks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ANSWER = """
import socket, struct, sys
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("198.51.100.2", 53))
print(flush=True)
while True:
    question, client = server.recvfrom(512)
    kind = question[-4:-2]  # RFC 1035, 4.1.2: of the one question that there is
    answers = b"\\xc0\\x0c\\0\\1\\0\\1" + struct.pack(">IH", 60, 4) + bytes([192, 0, 2, 80]) if kind == b"\\0\\1" else b""
    end = question.index(b"\\0", 12) + 5
    head = question[:2] + b"\\x81\\x80" + struct.pack(">HHHH", 1, bool(answers), 0, 0)
    server.sendto(head + question[12:end] + answers, client)
"""


def test_name_servers_of_one_s_own_beside_the_names(net: Cli, network_namespace: tuple[str, ...]) -> None:
    """--dns: the server's answers are had, those of the network's machines too, and another machine has nothing of it."""
    place = network_namespace[1].replace("-in-", "-out-")
    upstream = subprocess.Popen(["nsenter", place, "python3", "-c", ANSWER], stdout=subprocess.PIPE, text=True)
    try:
        assert upstream.stdout is not None and upstream.stdout.readline() == "\n"
        start(net, "own", "--dns", "198.51.100.2")
        start(net, "web", "-p", "198.51.100.1:53:53/udp")  # a name server, which takes nobody's questions
        assert "192.0.2.80" in net("exec", "own", "nslookup", "somewhere.example").out
        assert can_ping(net, "own", "web") and can_ping(net, "own", "host.nagaya.internal")
        assert can_ping(net, "web", "own")
        assert "192.0.2.80" not in net("exec", "web", "nslookup", "somewhere.example").out
        (found,) = net.json("network", "inspect", "nagaya0")
        (pid_file,) = (name for name in os.listdir(f"/run/nagaya-names/{found['bridge']}") if name.startswith("pid-"))
        os.kill(int(open(f"/run/nagaya-names/{found['bridge']}/{pid_file}").read()), signal.SIGKILL)
        assert "name server of network 'nagaya0' was gone" in net("network", "ls").err
        assert "192.0.2.80" in net("exec", "own", "nslookup", "somewhere.example").out
        net.ok("rm", "-f", "web")
        assert net("exec", "own", "nslookup", "web").code != 0
        net.ok("rm", "-f", "own")
        assert not os.path.exists(f"/run/nagaya-names/{found['bridge']}")
    finally:
        upstream.kill()
        upstream.wait()
        if upstream.stdout is not None:
            upstream.stdout.close()


def test_a_machine_on_two_networks_finds_names_on_both_and_a_rename_is_told(net: Cli) -> None:
    net.ok("network", "create", "front")
    net.ok("network", "create", "back", "--internal")
    start(net, "a", "--network", "front")
    start(net, "b", "--network", "back")
    start(net, "both", "--network", "back", "--network", "front")
    assert can_ping(net, "both", "a") and can_ping(net, "both", "b") and can_ping(net, "both", "198.51.100.2")
    assert can_ping(net, "a", "both") and can_ping(net, "b", "both")
    assert not can_ping(net, "a", "b")
    net.ok("rename", "a", "renamed")
    assert can_ping(net, "both", "renamed") and not can_ping(net, "both", "a")
    net.ok("restart", "-t", "0", "renamed")
    assert can_ping(net, "both", "renamed")


# -- isolation


def test_two_networks_have_no_path_between_them(net: Cli) -> None:
    net.ok("network", "create", "front")
    net.ok("network", "create", "back", "--internal")
    start(net, "a", "--network", "front", program=("httpd", "-f", "-p", "80", "-h", "/etc"))
    start(net, "b", "--network", "back", program=("httpd", "-f", "-p", "80", "-h", "/etc"))
    start(net, "c", program=("httpd", "-f", "-p", "80", "-h", "/etc"))
    places = {"a": "front", "b": "back", "c": "nagaya0"}
    where = {name: member(net, network, name) for name, network in places.items()}
    for one in places:
        for other in places:
            for family, address in (
                ("address", where[other]["address"]),
                ("address6", f"[{where[other]['address6']}]"),
            ):
                ran = net("exec", one, "timeout", "2", "wget", "-q", "-O", "-", f"http://{address}/passwd")
                reached = "root:" in ran.out
                assert reached == (one == other), (one, other, family, ran)
                assert can_ping(net, one, where[other][family]) == (one == other)
            assert can_ping(net, one, other) == (one == other), "not by name either"
    assert can_ping(net, "a", "198.51.100.2")  # the world beyond the host
    assert not can_ping(net, "b", "198.51.100.2")  # an internal network has no way out


def test_the_host_is_out_of_reach_but_for_names_and_ping(net: Cli) -> None:
    server = subprocess.Popen([*net.prefix, "busybox", "httpd", "-f", "-p", "[::]:8080", "-h", "/etc"])
    try:
        start(net, "in")
        start(net, "trusted", "--allow-host")
        (found,) = net.json("network", "inspect", "nagaya0")
        for address in (found["gateway"], f"[{found['gateway6']}]", "198.51.100.1"):
            ran = net("exec", "in", "timeout", "2", "wget", "-q", "-O", "-", f"http://{address}:8080/passwd")
            assert ran.code != 0 and "root:" not in ran.out, address
            deadline = time.monotonic() + 10
            while (
                "root:"
                not in net(
                    "exec", "trusted", "timeout", "2", "wget", "-q", "-O", "-", f"http://{address}:8080/passwd"
                ).out
            ):
                assert time.monotonic() < deadline, address
        assert can_ping(net, "in", found["gateway"]) and can_ping(net, "in", found["gateway6"])
        assert not can_ping(net, "in", "198.51.100.1")
    finally:
        server.kill()
        server.wait()


SPOOF = """
import socket, struct, sys, time
mac, victim_mac, own4, other4, own6, other6, gateway = sys.argv[1:8]
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
m = lambda text: bytes.fromhex(text.replace(":", ""))
a4, a6 = socket.inet_aton, lambda text: socket.inet_pton(socket.AF_INET6, text)
def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def ip4(source, target, body, protocol=17):
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0, a4(source), a4(target))
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + body
def udp(mark):
    return struct.pack(">HHHH", 9, 9, 8 + len(mark), 0) + mark
def ip6(source, target, body, protocol, hops=255):
    return struct.pack(">IHBB16s16s", 6 << 28, len(body), protocol, hops, a6(source), a6(target)) + body
def icmp6(source, target, kind, body):
    pseudo = a6(source) + a6(target) + struct.pack(">II", len(body) + 4, 58)
    return ip6(source, target, struct.pack(">BBH", kind, 0, checksum(pseudo + struct.pack(">BBH", kind, 0, 0) + body)) + body, 58)
def arp(sender_mac, sender4, target4, operation=2):
    return struct.pack(">HHBBH6s4s6s4s", 1, 0x800, 6, 4, operation, m(sender_mac), a4(sender4), m(victim_mac), a4(target4))
eth = lambda source, kind, body, target=victim_mac: m(target) + m(source) + struct.pack(">H", kind) + body
pad = lambda frame: frame + bytes(max(0, 60 - len(frame)))
forged = "02:00:00:00:66:66"
attempts = {
    "honest": eth(mac, 0x800, ip4(own4, other4, udp(b"MARK-honest--"))),
    "mac": eth(forged, 0x800, ip4(own4, other4, udp(b"MARK-mac-----"))),
    "ipv4": eth(mac, 0x800, ip4(gateway, other4, udp(b"MARK-ipv4----"))),
    "ipv4-of-another": eth(mac, 0x800, ip4("203.0.113.7", other4, udp(b"MARK-ipv4b---"))),
    "ipv6": eth(mac, 0x86dd, ip6("fd00:bad::1", other6, udp(b"MARK-ipv6----"), 17)),
    "vlan": eth(mac, 0x8100, struct.pack(">HH", 5, 0x800) + ip4(own4, other4, udp(b"MARK-vlan----"))),
    "ethertype": eth(mac, 0x88b5, b"MARK-ethertype"),
    "llc": eth(mac, 0x0026, b"MARK-llc-----" + bytes(30)),
    "arp-gateway": pad(eth(mac, 0x806, arp(mac, gateway, other4) + b"MARK-arp-----")),
    "arp-mac": pad(eth(mac, 0x806, arp(forged, own4, other4) + b"MARK-arp2----")),
    "arp-question": pad(eth(mac, 0x806, arp(mac, gateway, other4, 1) + b"MARK-arp3----")),
    "advertisement": eth(mac, 0x86dd, icmp6(own6, other6, 136, struct.pack(">I", 0x60000000) + a6("fd00:bad::1") + b"\\2\\1" + m(mac))),
    "router": eth(mac, 0x86dd, icmp6(own6, other6, 134, struct.pack(">BBHII", 64, 0, 1800, 0, 0))),
    "redirect": eth(mac, 0x86dd, icmp6(own6, other6, 137, bytes(4) + a6("fd00:bad::1") + a6("fd00:bad::2"))),
    "dhcp-server": eth(mac, 0x800, ip4(gateway, other4, struct.pack(">HHHH", 67, 68, 21, 0) + b"MARK-dhcp----")),
}
for name, frame in attempts.items():
    raw.send(frame)
    time.sleep(0.02)
print(",".join(attempts))
"""
LISTEN = """
import socket, time, sys
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.bind(("eth0", 0))
raw.settimeout(0.2)
print("ready", flush=True)
end, seen = time.monotonic() + float(sys.argv[1]), set()
while time.monotonic() < end:
    try:
        frame = raw.recv(2048)
    except TimeoutError:
        continue
    if b"MARK-" in frame:
        seen.add(frame[frame.index(b"MARK-"):][:9].decode())
    if frame[12:14] == b"\\x86\\xdd" and frame[20] == 58 and frame[54] in (134, 136, 137) and bytes.fromhex(sys.argv[2]) == frame[6:12]:
        if frame[54] != 136 or frame[62:66] == bytes.fromhex("fd000bad"):
            seen.add(f"icmp6-{frame[54]}")
print(sorted(seen))
"""


def test_spoofed_frames_do_not_arrive(net: Cli) -> None:
    """The attacker is root with raw sockets in a machine; the program is this host's Python, run in its namespaces."""
    start(net, "bad")
    start(net, "good")
    bad, good = member(net, "nagaya0", "bad"), member(net, "nagaya0", "good")
    (found,) = net.json("network", "inspect", "nagaya0")
    pids = {machine["name"]: machine["pid"] for machine in net.machines()}
    assert can_ping(net, "bad", "good")
    enter = {name: ["nsenter", f"--net=/proc/{pid}/ns/net", "python3", "-c"] for name, pid in pids.items()}
    listener = subprocess.Popen(
        [*enter["good"], LISTEN, "4", bad["mac"].replace(":", "")], stdout=subprocess.PIPE, text=True
    )
    assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
    sent = subprocess.run(
        [*enter["bad"], SPOOF, bad["mac"], good["mac"], bad["address"], good["address"], bad["address6"],
         good["address6"], found["gateway"]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert sent.stdout.count(",") == 14
    seen = listener.communicate(timeout=30)[0]
    assert seen == "['MARK-hone']\n", "of all those only the honest one"


# -- changes and damage


def test_connect_and_disconnect_while_it_runs(net: Cli) -> None:
    net.ok("network", "create", "back", "--subnet", "172.30.5.0/24", "--opt", "mtu=1400", "--label", "tier=2")
    start(net, "web")
    start(net, "db", "--network", "back:ip=172.30.5.9,mac=02:00:00:00:05:09")
    assert member(net, "back", "db")["mac"] == "02:00:00:00:05:09"
    assert not can_ping(net, "web", "db")
    net.ok("network", "connect", "--alias", "front-of-db", "--ip", "172.30.5.77", "back", "web")
    assert can_ping(net, "web", "172.30.5.9") and can_ping(net, "db", "web") and can_ping(net, "db", "front-of-db")
    assert "172.30.5.77/24" in net.ok("exec", "web", "ip", "address", "show", "eth1")
    assert "mtu 1400" in net.ok("exec", "web", "ip", "link", "show", "eth1")
    assert net("network", "connect", "back", "web").code == 1
    assert net("network", "rm", "back").code == 1
    net.ok("restart", "-t", "0", "web")
    assert can_ping(net, "web", "172.30.5.9")  # it is part of the machine now
    net.ok("network", "disconnect", "back", "web")
    assert not can_ping(net, "web", "172.30.5.9") and net("exec", "web", "ip", "link", "show", "eth1").code != 0
    assert net("network", "disconnect", "back", "web").code == 1
    net.ok("network", "disconnect", "nagaya0", "web")  # its last one
    assert "eth" not in net.ok("exec", "web", "ip", "link")
    net.ok("network", "connect", "back", "web")
    assert can_ping(net, "web", "db")
    start(net, "alone", "--network", "none")
    assert "from the next start" in net("network", "connect", "back", "alone").err
    net.ok("restart", "-t", "0", "alone")
    assert can_ping(net, "alone", "db")
    net.ok("rm", "-f", "alone")
    ran = net("create", "--name", "late", "--network", "back:ip=172.30.5.9", "busybox", "sleep", "600")
    assert ran.code == 0
    assert "in use by machine" in net("start", "late").err
    net.ok("stop", "-t", "0", "db")
    net.ok("start", "late")
    assert member(net, "back", "late")["address"] == "172.30.5.9"


def test_what_a_machine_knows_of_its_networks_follows_them(net: Cli) -> None:
    """/etc/hosts, /etc/resolv.conf and the default routes, while it runs."""
    net.ok("network", "create", "front", "--subnet", "172.30.6.0/24")
    start(net, "web")
    start(net, "db", "--network", "front")
    first = {name: net.ok("exec", "web", "cat", f"/etc/{name}") for name in ("hosts", "resolv.conf")}
    net.ok("network", "connect", "--ip", "172.30.6.77", "front", "web")
    assert "172.30.6.77\t" in net.ok("exec", "web", "cat", "/etc/hosts")
    assert "search nagaya0.nagaya.internal front.nagaya.internal" in net.ok("exec", "web", "cat", "/etc/resolv.conf")
    assert can_ping(net, "web", "db")
    net.ok("network", "disconnect", "front", "web")
    assert {name: net.ok("exec", "web", "cat", f"/etc/{name}") for name in first} == first
    net.ok("network", "connect", "--ip", "172.30.6.77", "front", "web")
    net.ok("network", "disconnect", "nagaya0", "web")  # with its name server and its default routes
    assert net.ok("exec", "web", "cat", "/etc/resolv.conf").endswith("nameserver 172.30.6.1\n")
    assert can_ping(net, "web", "db") and can_ping(net, "web", "198.51.100.2")
    assert "default via fd" in net.ok("exec", "web", "ip", "-6", "route")
    net.ok("exec", "web", "sh", "-c", "echo '# mine' >> /etc/hosts")
    own = net.ok("exec", "web", "cat", "/etc/hosts")
    net.ok("network", "connect", "nagaya0", "web")
    assert net.ok("exec", "web", "cat", "/etc/hosts") == own, "what the machine has changed is its own"


@pytest.mark.parametrize(
    "damage",
    [
        "flush ruleset", "flush table inet TABLE", "delete table bridge TABLE", "flush chain inet TABLE input",
        "flush set bridge TABLE senders6", "flush map inet TABLE anyports4", 'delete element inet TABLE trusted4 { "BRIDGE" . ADDRESS }',
    ],
)  # fmt: skip
def test_a_damaged_firewall_is_made_again(net: Cli, damage: str) -> None:
    outside(net, "nft", "add", "table", "inet", "theirs")
    net.ok("network", "create", "front")
    start(net, "a", "--network", "front", "--network", "bridge", "--allow-host", "-p", "0.0.0.0:8080:80")
    start(net, "b")
    before = ruleset(net)
    (found,) = net.json("network", "inspect", "nagaya0")
    damage = damage.replace("TABLE", found["bridge"].replace("-", "_")).replace("BRIDGE", found["bridge"])
    outside(net, "nft", damage.replace("ADDRESS", member(net, "nagaya0", "a")["address"]))
    assert ruleset(net) != before
    assert damage_found(net) == "the firewall's tables were damaged"
    if damage.startswith("delete element"):
        ran = net("network", "ls")
        assert ran.code == 0 and "loaded anew" in ran.err
    else:  # of what is not one element alone any start takes note
        net.ok("run", "--rm", "busybox", "true")
    if damage == "flush ruleset":
        outside(net, "nft", "add", "table", "inet", "theirs")
    assert ruleset(net) == before
    assert damage_found(net) == "nothing is missing"
    assert net("network", "ls").err == ""


def damage_found(net: Cli) -> str:
    return next(one["found"] for one in net.json("doctor", "--json") if one["topic"] == "networks in use")


def test_after_a_reboot_machines_start_as_before(net: Cli) -> None:
    """What a reboot takes away: processes, links, rules, /run. What it leaves: the store, leases of those that ran among it."""
    start(net, "a")
    start(net, "b", "--ip6", (first := net.json("network", "inspect", "nagaya0")[0])["subnet6"].replace("::/64", "::b"))
    before = {name: member(net, "nagaya0", name) for name in ("a", "b")}
    for one in before.values():
        os.kill(supervisors(net.root, one["id"])[0], signal.SIGKILL)
    for name in ("a", "b"):
        while supervisors(net.root, before[name]["id"]):
            time.sleep(0.01)
    outside(net, "ip", "link", "delete", first["bridge"])
    outside(net, "nft", "flush", "ruleset")
    os.kill(int(open(f"/run/nagaya-names/{first['bridge']}/pid").read()), signal.SIGKILL)
    subprocess.run(["rm", "-rf", f"/run/nagaya-names/{first['bridge']}", f"{net.root}/run"], check=True)
    assert {machine["state"] for machine in net.machines()} == {"exited"}
    assert os.listdir(f"{net.root}/network/nagaya0/leases") == []
    net.ok("start", "a", "b")
    assert {name: member(net, "nagaya0", name) for name in ("a", "b")} == before
    assert can_ping(net, "a", "b") and can_ping(net, "b", "198.51.100.2")


def test_a_deleted_bridge_is_made_again(net: Cli) -> None:
    start(net, "a")
    start(net, "b")
    (found,) = net.json("network", "inspect", "nagaya0")
    outside(net, "ip", "link", "delete", found["bridge"])
    assert not can_ping(net, "a", "b")
    net.ok("network", "ls")
    assert can_ping(net, "a", "b") and can_ping(net, "a", "198.51.100.2")


def test_two_stores_never_choose_the_same_subnet(
    net: Cli, tmp_path_factory: pytest.TempPathFactory, busybox_root: str
) -> None:
    others = []
    for _ in range(4):
        root = str(tmp_path_factory.mktemp("other") / "store")
        os.mkdir(root)
        subprocess.run(["cp", "-a", f"{busybox_root}/images", root], check=True)
        others.append(Cli(root, prefix=net.prefix))
    try:
        running = [one.popen("run", "-d", "busybox", "sleep", "600") for one in others]
        assert [process.wait(60) for process in running] == [0] * 4
        subnets = [one.json("network", "inspect", "nagaya0")[0]["subnet"] for one in others]
        assert len(set(subnets)) == 4, subnets
    finally:
        for one in others:
            remove_all(one)
            one.ok("prune", "-f")


@pytest.mark.timeout(120 + 3 * MANY)
def test_many_machines_and_random_kills_leave_exactly_the_survivors(net: Cli) -> None:
    """Show 4: addresses, names and rules are those of the machines that live."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    names = [f"m{number}" for number in range(MANY)]
    for at in range(0, MANY, 10):
        running = [net.popen("run", "-d", "--name", name, "busybox", "sleep", "3600") for name in names[at : at + 10]]
        assert [process.wait(120) for process in running] == [0] * len(running)
    (found,) = net.json("network", "inspect", "nagaya0")
    assert (
        len({one["address"] for one in found["machines"]})
        == len({one["address6"] for one in found["machines"]})
        == MANY
    )
    killed = random.Random(seed).sample(found["machines"], MANY // 2)
    for one in killed:
        os.kill(supervisors(net.root, one["id"])[0], signal.SIGKILL)
    net.ok("ps", "-a")  # the next command repairs
    (after,) = net.json("network", "inspect", "nagaya0")
    dead = {one["id"] for one in killed}
    alive = [one for one in found["machines"] if one["id"] not in dead]
    now = {one["id"]: one for one in after["machines"] if one["address"]}
    assert now == {one["id"]: one for one in alive}
    assert sorted(os.listdir(f"{net.root}/network/nagaya0/leases")) == sorted(
        address for one in alive for address in (one["address"], one["address6"])
    )
    assert sorted(os.listdir(f"/run/nagaya-names/{found['bridge']}/hosts")) == sorted(now)
    links = json.loads(outside(net, "ip", "-j", "link"))
    assert sorted(link["ifname"] for link in links if link["ifname"].startswith("ngy")) == sorted(
        one["link"] for one in alive
    )
    incremental = ruleset(net)
    outside(net, "nft", "flush", "ruleset")
    net.ok("network", "ls")
    assert ruleset(net) == incremental, "what came by elements is what a rebuild makes"
    assert incremental.count('"ngy') == len(alive) * (1 + 1 + 1 + 1 + 2 + 2)
    for one in random.Random(seed).sample(alive, 3):
        assert can_ping(net, one["machine"], random.Random(seed).choice(alive)["machine"])


# -- the commands


WRONG = (
    (("network", "create", "host"), 2, "cannot be a network's name"),
    (("network", "create", "a b"), 2, "cannot be a network's name"),
    (("network", "create", "n", "--subnet", "10.0.0.1/8"), 2, "first address"),
    (("network", "create", "n", "--subnet", "198.51.100.0/25"), 1, "overlaps 198.51.100.0/24"),
    (("network", "create", "n", "--subnet", "10.9.0.0/31"), 2, "no room"),
    (("network", "create", "n", "--gateway", "10.9.0.1"), 2, "lies in no --subnet"),
    (("network", "create", "n", "--opt", "mtu=12"), 2, "MTU"),
    (("network", "create", "n", "-d", "ipvlan"), 2, "unknown network driver"),
    (("network", "create", "n", "-d", "macvlan"), 2, "parent"),
    (("network", "rm", "nagaya0"), 1, "cannot be removed"),
    (("network", "rm", "nothing"), 1, "no network 'nothing'"),
    (("network", "inspect", "nothing"), 1, "no network 'nothing'"),
    (("network", "connect", "nothing", "nobody"), 1, "no network 'nothing'"),
    (("run", "--network", "nothing", "busybox"), 125, "no network 'nothing'"),
    (("run", "--network", "host:ip=10.0.0.1", "busybox"), 125, "takes no options"),
    (("run", "--network", "none", "--ip", "10.0.0.1", "busybox"), 125, "has no meaning"),
    (("run", "--network", "bridge", "--network", "bridge", "busybox"), 125, "given twice"),
    (("run", "--mac-address", "01:00:00:00:00:01", "busybox"), 125, "a group's"),
    (("run", "--network-alias", "-x", "busybox"), 125, "no name for a machine"),
    (("run", "--ip", "192.0.2.1", "busybox"), 125, "no address for a machine"),
)  # fmt: skip


def test_bad_input_is_refused_with_a_sentence(net: Cli) -> None:
    for argv, code, text in WRONG:
        ran = net(*argv)
        assert ran.code == code and text in ran.err and "Traceback" not in ran.err, (argv, ran)
        assert net.machine_ids() == []


def test_one_mac_address_is_one_machine_s(net: Cli) -> None:
    start(net, "a", "--mac-address", "02:00:00:00:00:aa")
    ran = net("run", "-d", "--name", "b", "--mac-address", "02-00-00-00-00-AA", "busybox", "sleep", "600")
    assert ran.code == 125 and "in use on network 'nagaya0'" in ran.err
    assert len(os.listdir(f"{net.root}/network/nagaya0/leases")) == 2  # b's were given back
    assert can_ping(net, "a", "198.51.100.2")
    (inspected,) = net.json("inspect", "a")
    assert inspected["links"][0]["mac"] == "02:00:00:00:00:aa"
    assert net.ok("ps", "-q", "--filter", "network=nagaya0").split() == [inspected["id"][:12]]


def test_lists_and_templates(net: Cli) -> None:
    made = net.ok("network", "create", "front", "-l", "tier=1").strip()
    net.ok("network", "create", "back", "--internal", "--ipv6=false")
    assert net("network", "create", "front").code == 1
    assert net.ok("network", "ls", "-q", "--no-trunc", "--filter", "label=tier=1").strip() == made
    assert (
        net.ok("network", "ls", "--format", "{{.Name}} {{.Internal}} {{.IPv6}}")
        == "back true false\nfront false true\n"
    )
    start(net, "web", "--network", "front")
    assert (
        net.ok("network", "ls", "--filter", "dangling=true", "--format", "{{.Name}}").split() == ["back", "nagaya0"][:1]
    )
    template = "{{range .machines}}{{.machine}} {{.type}} {{.address}}{{end}}"
    name, type_, address = net.ok("network", "inspect", "-f", template, "front").split()
    assert (name, type_) == ("web", "container") and address.startswith("10.64.")
    assert net.ok("network", "inspect", "-f", "{{.name}}", made[:8]).strip() == "front"
    assert net.ok("network", "prune", "-f").split() == ["back"]
    net.ok("rm", "-f", "web")
    assert net.ok("network", "rm", "front").strip() == "front"
    assert net.json("network", "ls", "--json") == []
