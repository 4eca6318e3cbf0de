"""`nagaya ssh`."""

from __future__ import annotations

import os
import time

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import Conflict, Unsupported
from nagaya.manager.front import Login

WAIT_S = 300.0
_ASK_AGAIN_S = 0.5


def ssh(context: Context, parsed: Parsed) -> int:
    """Become an ssh client, once the machine's server answers."""
    name, *command = parsed.words
    login = context.host.machines.get(name).front.find_login()
    if parsed.text("login"):
        login = login._replace(user=parsed.text("login"))
    wait_s = values.parse_timeout(parsed.text("wait"), "--wait") if parsed.given("wait") else WAIT_S
    _wait_for_server(login, name, wait_s)
    argv = [
        "ssh", "-i", login.key, "-p", str(login.port), "-l", login.user, "-o", "IdentitiesOnly=yes",
        "-o", f"UserKnownHostsFile={login.known_hosts}", "-o", "GlobalKnownHostsFile=/dev/null",
        "-o", "StrictHostKeyChecking=accept-new", "-o", f"HostKeyAlias={name}", "-o", "LogLevel=ERROR",
        *(("-t",) if parsed.switch("tty") else ()), "--", login.host, *command,
    ]  # fmt: skip
    try:
        os.execvp("ssh", argv)
    except FileNotFoundError:
        raise Unsupported(
            "there is no ssh client on this host", hint="as root: apt-get install openssh-client"
        ) from None


def _wait_for_server(login: Login, name: str, wait_s: float) -> None:
    """Until a server greets. A port that QEMU forwards can be connected to before anybody listens behind it."""
    import socket  # lazy: start-up of other commands

    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            with socket.create_connection((login.host, login.port), timeout=5) as connection:
                if connection.recv(4) == b"SSH-":
                    return
        except OSError:
            pass  # nobody is there yet
        if time.monotonic() >= deadline_s:
            raise Conflict(
                f"no ssh server answers in machine '{name}'",
                hint=f"'nagaya logs {name}' shows how far its system has come; --wait SECONDS waits longer",
                state="no answer",
            )
        time.sleep(_ASK_AGAIN_S)  # a machine that boots tells nobody when it is ready


SSH = Command(
    ssh,
    usage="MACHINE [COMMAND [ARG...]]",
    words=(1, MANY),
    program_after=1,
    runs_program=True,
    flags=(
        Flag("-l --login", "User to log in as (default: root, or what --ssh-user said)", value="USER"),
        Flag("-t --tty", "Give COMMAND a terminal"),
        Flag("--wait", "Seconds to wait for its ssh server (default 300)", value="SECONDS"),
    ),
    about="Of machines that were created with --cloud-init, which have a key of their own in the store. The status is"
    " that of COMMAND.",
    examples=(("nagaya ssh web", ""), ("nagaya ssh web systemctl is-system-running --wait", "")),
)
