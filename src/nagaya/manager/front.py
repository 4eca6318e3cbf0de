"""What a whole machine has instead of an agent of ours: a screen, a keyboard, and a way to log in."""

from __future__ import annotations

import os
from contextlib import ExitStack

from nagaya.errors import HostError, NagayaError, NotFound, RemoteError, Unsupported
from nagaya.model.state import ALIVE, RUNNING, require
from nagaya.static import NamedTuple
from nagaya.storage import machines
from nagaya.storage.disk_images.chain import open_chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.bay import Bay
    from nagaya.manager.machine import Machine


class Login(NamedTuple):
    """Where and how an ssh client gets in. `key` and `known_hosts` are paths of files."""

    user: str
    host: str
    port: int
    key: str
    known_hosts: str


class FrontPanel:
    """Of a machine that runs: what needs it to raises `Conflict` otherwise."""

    def __init__(self, machine: Machine) -> None:
        if machine.spec.hardware is None:
            raise Unsupported(
                f"machine '{machine.name}' was made from an image: it has no screen, and no key to log in by",
                hint=f"'nagaya attach {machine.name}' shows its program, 'nagaya exec {machine.name} sh' starts another",
            )
        self._machine = machine

    def find_screen(self) -> str:
        """The path of the socket at which a viewer gets the screen (VNC)."""
        self._require("screen")
        return f"{self._machine.runtime_dir}/screen.sock"

    def take_picture(self, *, format: str = "png") -> bytes:
        """What the screen shows, as "png" or "ppm"."""
        self._require("screen")
        name = str(self._machine.ask("screenshot", format=format).get("file"))
        if "/" in name:
            raise RemoteError("the machine's supervisor named no file of its own")
        path = f"{self._machine.runtime_dir}/{name}"
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise HostError.from_os(error, "cannot read the picture of the screen") from None
        finally:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def press_keys(self, keys: tuple[str, ...] = (), *, text: str = "") -> None:
        """Press keys ("ctrl-alt-delete", "f2"), then type `text`. Raises `UsageError` for what is no key."""
        self._require("keys")
        self._machine.ask("press_keys", keys=list(keys), text=text)

    def find_login(self) -> Login:
        """How to log in by ssh. Raises `Unsupported` for one whose system was not told of a key of ours."""
        machine = self._machine
        assert machine.spec.hardware is not None
        seed = machine.spec.hardware.seed
        if seed is None:
            raise Unsupported(
                f"machine '{machine.name}' has no key of Nagaya's in it, for it was made without --cloud-init or --install",
                hint=f"log in on its console: nagaya attach {machine.name}",
            )
        self._require("login")
        answer = machine.ask("login")
        host, port = str(answer.get("host") or ""), int(str(answer.get("port") or 0))
        if not host:
            raise Unsupported(
                f"machine '{machine.name}' has no network to log in by", hint="create it with a --network"
            )
        return Login(seed.user, host, port, f"{machine.directory}/id_ed25519", f"{machine.directory}/known_hosts")

    def find_guest_links(self) -> list[object] | None:
        """Name, MAC and addresses of its network interfaces as its system says; None where it does not run QEMU's agent."""
        if self._machine.state.phase != RUNNING:
            return None
        try:
            links = self._machine.ask("guest_links").get("links")
        except NagayaError:
            return None  # it is just ending, or what is in it keeps to no protocol
        return links if isinstance(links, list) else None

    @property
    def bay(self) -> Bay:
        """Its disks: put in, taken out, made larger."""
        from nagaya.manager.bay import Bay  # lazy: rare

        return Bay(self._machine)

    def change_disc(self, path: str, *, drive: int = 0) -> None:
        """Put the ISO image at `path` into its CD drive number `drive`; "" takes the disc out. Also of one that is off.

        Raises `NotFound` without such a drive, and what is wrong with the image; the old disc is in then.
        """
        machine = self._machine
        with machine.lock():
            machine.reload()
            hardware = machine.spec.hardware
            assert hardware is not None
            places = [at for at, each in enumerate(hardware.drives) if each.cdrom and not each.own]
            if not 0 <= drive < len(places):
                raise NotFound(
                    f"machine '{machine.name}' has {len(places)} CD drives, and no number {drive}",
                    hint="a machine is created with them: --cdrom empty",
                )
            at, before = places[drive], machine.spec
            if path:
                path = os.path.realpath(path)
                with ExitStack() as stack:
                    open_chain(path, stack, format="raw", lock=False)
            drives = list(hardware.drives)
            drives[at] = drives[at]._replace(path=path, format="raw")
            machine.spec = before._replace(hardware=hardware._replace(drives=tuple(drives)))
            machines.store_spec(machine.paths, machine.spec)
            if machine.settled().phase in ALIVE:
                try:
                    machine.ask("change_disc", drive=at)
                except NagayaError:
                    machine.spec = before
                    machines.store_spec(machine.paths, before)
                    raise
        machine.record("disc", disc=path)

    def _require(self, command: str) -> None:
        require(command, self._machine.state.phase, self._machine.name)
