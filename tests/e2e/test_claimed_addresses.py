"""Systems that choose their link-local addresses themselves (RFC 7217), as a whole machine's may: nobody can take another's.

Containers stand for them: what the plan says of one is changed to say that it sets itself up, and so it does, by its kernel.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time

import pytest

from nagaya.net import firewall
from tests.e2e.command import Cli
from tests.e2e.processes import supervisors
from tests.e2e.test_networks import SOLICIT, can_ping, member, outside, start


def pid_of(net: Cli, name: str) -> int:
    return next(int(machine["pid"]) for machine in net.machines() if machine["name"] == name)


def inside(net: Cli, name: str, *argv: str) -> str:
    """A program of this host's in the machine's network namespace."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid_of(net, name)}/ns/net", *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (argv, done)
    return done.stdout


def let_set_itself_up(net: Cli, *names: str) -> None:
    """As if there were systems of their own inside; the firewall is told of it by a rebuild."""
    for machine in net.machines():
        if machine["name"] in names:
            path = f"{net.root}/run/{machine['id']}/network.json"
            with open(path) as file:
                plan = json.load(file)
            for link in plan["links"]:
                link["sets_itself_up"] = True
            with open(path, "w") as file:
                json.dump(plan, file)
    assert "firewall's tables were damaged" in net("network", "ls").err


def choose_address(net: Cli, name: str) -> str:
    """Have the machine's kernel make a link-local address by a secret of its own, and wait until it has found it free."""
    script = (
        "ip link set eth0 down; ip -6 address flush dev eth0; cd /proc/sys/net/ipv6/conf/eth0;"
        "echo 3 > addr_gen_mode; echo 2 > accept_ra; echo 1 > accept_dad; ip link set eth0 up"
    )
    inside(net, name, "sh", "-ec", script)
    deadline = time.monotonic() + 20
    while True:
        (link,) = json.loads(inside(net, name, "ip", "-j", "-6", "address", "show", "dev", "eth0"))
        own = [one for one in link["addr_info"] if one["scope"] == "link" and not one.get("tentative")]
        if own and not own[0].get("dadfailed"):
            return str(own[0]["local"])
        assert time.monotonic() < deadline, link
        time.sleep(0.1)


def reaches(net: Cli, name: str, address: str) -> bool:
    return can_ping(net, name, f"{address}%eth0")


def claims(net: Cli, name: str) -> int:
    (found,) = net.json("network", "inspect", "nagaya0")
    table, link = found["bridge"].replace("-", "_"), member(net, "nagaya0", name)["link"]
    return outside(net, "nft", "list", "set", "bridge", table, "claims6").count(f'"{link}"')


SEND = """
import json, os, socket, struct, sys
given = json.load(sys.stdin)
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
a6, m = lambda text: socket.inet_pton(socket.AF_INET6, text), lambda text: bytes.fromhex(text.replace(":", ""))
def icmp6(source, target, kind, body, hops=255):
    pseudo = a6(source) + a6(target) + struct.pack(">II", len(body) + 4, 58)
    data = sum(struct.unpack(f">{(len(pseudo) + len(body) + 4) // 2}H", pseudo + struct.pack(">BBH", kind, 0, 0) + body))
    data = (data >> 16) + (data & 0xffff)
    data = ~((data >> 16) + data) & 0xffff
    return struct.pack(">IHBB16s16s", 6 << 28, len(body) + 4, 58, hops, a6(source), a6(target)) + struct.pack(">BBH", kind, 0, data) + body
def send(source, kind, body, target="ff02::1", hops=255):
    raw.send(m("33:33:00:00:00:01") + m(given["mac"]) + b"\\x86\\xdd" + icmp6(source, target, kind, body, hops))
source_mac = lambda mac: b"\\1\\1" + m(mac)
target_mac = lambda mac: b"\\2\\1" + m(mac)
solicit = lambda target, option=b"": (135, bytes(4) + a6(target) + option)
advertise = lambda target, option: (136, struct.pack(">I", 0x20000000) + a6(target) + option)
if given["what"] == "flood":
    for _ in range(given["count"]):
        send("::", *solicit(socket.inet_ntop(socket.AF_INET6, b"\\xfe\\x80" + bytes(6) + os.urandom(8))))
    sys.exit()
if given["what"] == "ask":
    send("::", *solicit(given["victims"][0]))
    sys.exit()
own, mine = given["own"], given["mac"]
echo = (128, b"\\0\\1\\0\\1MARK-bad")
for victim in given["victims"]:
    send(victim, *echo)                                            # as another
    send(victim, *solicit(own, source_mac(mine)))                  # "ask me"
    send(own, *advertise(victim, target_mac(mine)))                # "that is me"
    send(victim, *advertise(victim, target_mac(mine)))
    send("::", *solicit(victim))                                   # "is it mine?", for the whole of its first seconds
send(own, *advertise(own, target_mac("02:00:00:00:66:66")))        # "I am that one"
send(own, *solicit(given["victims"][0], source_mac("02:00:00:00:66:66")))
send(own, 136, struct.pack(">I", 0x20000000) + a6(own) + b"\\x0e\\1" + bytes(6) + target_mac("02:00:00:00:66:66"))  # behind another
send(own, 135, bytes(4) + a6(own) + source_mac(mine), hops=64)
send("fe80:0:0:1::5", *echo)                                       # no address of this link's
send(own, 128, b"\\0\\1\\0\\1MARK-own")
"""
LISTEN = """
import socket, sys, time
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.bind(("eth0", 0))
raw.settimeout(0.2)
print("ready", flush=True)
end, seen = time.monotonic() + 3, []
while time.monotonic() < end:
    try:
        frame = raw.recv(2048)
    except TimeoutError:
        continue
    if frame[6:12] == bytes.fromhex(sys.argv[1]) and frame[12:14] == b"\\x86\\xdd":
        source, kind = socket.inet_ntop(socket.AF_INET6, frame[22:38]), frame[54]
        about = socket.inet_ntop(socket.AF_INET6, frame[62:78]) if kind in (135, 136) else ""
        if frame[38:54] == socket.inet_pton(socket.AF_INET6, "ff02::1"):
            seen.append(f"{source} {kind} {about}".strip())
print("\\n".join(seen))
"""


def send(net: Cli, name: str, what: str, **given: object) -> None:
    words = json.dumps({"what": what, "mac": member(net, "nagaya0", name)["mac"], **given})
    pid = pid_of(net, name)
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "python3", "-c", SEND], input=words, text=True, check=True)


def listen(net: Cli, listener: str, speaker: str) -> subprocess.Popen[str]:
    """What of the speaker's comes: "source kind [target]" each."""
    mac = member(net, "nagaya0", speaker)["mac"].replace(":", "")
    enter = ["nsenter", f"--net=/proc/{pid_of(net, listener)}/ns/net"]
    ear = subprocess.Popen([*enter, "python3", "-c", LISTEN, mac], stdout=subprocess.PIPE, text=True)
    assert ear.stdout is not None and ear.stdout.readline() == "ready\n"
    return ear


def attack(net: Cli, attacker: str, own: str, victims: list[str], *, listener: str) -> set[str]:
    """Send all that is forged, and answer what of it has come."""
    ear = listen(net, listener, attacker)
    send(net, attacker, "forge", own=own, victims=victims)
    return set(ear.communicate(timeout=30)[0].split("\n")[:-1])


def test_a_link_local_address_is_his_who_took_it_first(net: Cli) -> None:
    for name in ("own", "bad", "plain"):
        start(net, name)
    where = {name: member(net, "nagaya0", name) for name in ("own", "bad", "plain")}
    (found,) = net.json("network", "inspect", "nagaya0")
    let_set_itself_up(net, "own", "bad")
    mine, others = choose_address(net, "own"), choose_address(net, "bad")
    assert mine != firewall.link_local(where["own"]["mac"]) and claims(net, "own") == 1

    # It has a router, an address by DHCPv6, and talks to neighbours, the host and the world.
    deadline = time.monotonic() + 30
    while "default via fe80" not in (routes := inside(net, "own", "ip", "-6", "route")):
        assert time.monotonic() < deadline, routes
        time.sleep(0.1)
    inside(net, "own", "python3", "-c", SOLICIT, where["own"]["mac"], where["own"]["address6"])
    inside(net, "own", "ip", "address", "add", f"{where['own']['address6']}/64", "dev", "eth0", "nodad")
    gateway = firewall.link_local(json.loads(outside(net, "ip", "-j", "link", "show", found["bridge"]))[0]["address"])
    assert reaches(net, "own", others) and reaches(net, "bad", mine)
    assert can_ping(net, "own", found["gateway6"]) and can_ping(net, "own", where["plain"]["address6"])

    # Another takes neither that, nor the gateway's, nor those that are kept for machines that have made no use of them.
    victims = [
        mine, gateway, found["gateway6"], where["own"]["address6"], where["plain"]["address6"],
        firewall.link_local(where["plain"]["mac"]), firewall.link_local(where["own"]["mac"]),
    ]  # fmt: skip
    asked = f":: 135 {mine}"  # for its owner to answer: two clones of one system have the same secret
    for _ in range(2):
        assert attack(net, "bad", others, victims, listener="plain") == {asked, f"{others} 128"}
        assert claims(net, "bad") == 1
        outside(net, "nft", "flush", "ruleset")  # somebody does: all is as before
        assert "firewall's tables were damaged" in net("network", "ls").err
    assert reaches(net, "own", others)

    # Nor does it take anybody's room.
    send(net, "bad", "flood", count=3000)
    assert 16 <= claims(net, "bad") <= 18
    assert claims(net, "own") == 1 and reaches(net, "own", others)
    start(net, "late")
    let_set_itself_up(net, "late")
    new = choose_address(net, "late")
    assert reaches(net, "late", mine) and claims(net, "late") == 1
    time.sleep(3)
    assert attack(net, "bad", others, [new], listener="plain") == {f":: 135 {new}", f"{others} 128"}
    table = found["bridge"].replace("-", "_")
    rules = outside(net, "nft", "-a", "list", "chain", "bridge", table, "claim")
    handle = rules.rpartition("# handle ")[2].split()[0]
    outside(net, "nft", "delete", "rule", "bridge", table, "claim", "handle", handle)  # some of it is gone
    assert "firewall's tables were damaged" in net("network", "ls").err
    assert claims(net, "own") == claims(net, "late") == 1 and claims(net, "bad") >= 16

    # What is left of a killed one is nobody's: and nothing of the others has changed.
    victim = next(machine["id"] for machine in net.machines() if machine["name"] == "own")
    link = where["own"]["link"]
    for pid in supervisors(net.root, victim):
        os.kill(pid, signal.SIGKILL)
    net.ok("ps", "-a")
    everything = outside(net, "nft", "list", "table", "bridge", table)
    assert (
        link not in everything
        and f"{int.from_bytes(socket.inet_pton(socket.AF_INET6, mine), 'big'):#x}" not in everything
    )
    assert claims(net, "late") == 1 and reaches(net, "late", others)


def test_nobody_keeps_another_from_an_address_that_he_asks_for(net: Cli) -> None:
    """Who hears the question while he waits for answers to his own gives the address up (RFC 4862, 5.4.3)."""
    for name in ("own", "bad", "plain"):
        start(net, name)
    let_set_itself_up(net, "own", "bad")
    for number in range(5):
        asked = f"fe80::5:{number + 1}"
        ear = listen(net, "plain", "bad")
        began = time.monotonic()
        send(net, "own", "ask", victims=[asked])
        send(net, "bad", "ask", victims=[asked])
        took_s = time.monotonic() - began
        heard = ear.communicate(timeout=30)[0]
        if took_s < 2.5:  # for three seconds it is to hold
            assert heard.strip() == ""
            break
    else:
        pytest.skip("needs a host that is not as busy")
    time.sleep(3)
    ear = listen(net, "plain", "bad")
    send(net, "bad", "ask", victims=[asked])
    assert f":: 135 {asked}" in ear.communicate(timeout=30)[0]


def test_what_is_set_up_by_us_has_no_choice(net: Cli) -> None:
    """A container's root can give itself any address, and is not heard with it."""
    for name in ("one", "other"):
        start(net, name)
    where = firewall.link_local(member(net, "nagaya0", "other")["mac"])
    deadline = time.monotonic() + 20
    while not reaches(net, "one", where):  # while its kernel looks for others with its address, it has none
        assert time.monotonic() < deadline
    inside(net, "one", "ip", "-6", "address", "flush", "dev", "eth0", "scope", "link")
    inside(net, "one", "ip", "address", "add", "fe80::abcd/64", "dev", "eth0", "nodad")
    assert not reaches(net, "one", where) and claims(net, "one") == 0
