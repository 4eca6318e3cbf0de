"""A save that is being written, as the supervisor has it: the files, and the end that hears of the writer's."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable

from nagaya.engines.kvm import saved
from nagaya.errors import HostError, NagayaError, RemoteError, from_wire
from nagaya.kernel import unix
from nagaya.static import Any, Self

WITHIN_S = 600.0  # a full memory onto a slow disk
_MOST_ANSWER_BYTES = 1 << 16


class Writing:
    """See `engines.base.Writing`."""

    def __init__(self, directory: str, base: str, ask: Callable[[tuple[int, ...], dict[str, Any]], object]) -> None:
        """Have the machine, which is paused, saved into `directory`: `ask` gives its VMM descriptors and what they are for.

        Raises `HostError`, and what `ask` and `saved.read` raise.
        """
        self._directory = directory
        self.fd = -1
        details: dict[str, Any] = {"notes": {}, "base": None, "place": ""}
        try:
            files = saved.create(directory)
            found = None
            self.fd, theirs = unix.socket_pair()
            try:
                found = _open_base(base)
                if found is not None:
                    details.update(base=saved.pack(found), place=os.path.relpath(base, directory))
                ask((*files, theirs, *(found.fds if found is not None else ())), details)
            finally:
                os.close(theirs)
                files.close()
                if found is not None:
                    found.close()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise HostError.from_os(error, "cannot save the machine's memory") from None
            raise

    def finish(self) -> None:
        """See `engines.base.Writing`."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(WITHIN_S * 1000):
            raise RemoteError(f"the machine's memory was not written within {WITHIN_S:.0f} s")
        data = os.read(self.fd, _MOST_ANSWER_BYTES)
        if not data.endswith(b"\n"):
            raise RemoteError("the machine's memory was not written: its writer has ended")
        message = json.loads(data)
        if "error" in message:
            raise from_wire(message["error"])
        try:
            saved.commit(self._directory)
        except OSError as error:
            raise HostError.from_os(error, "cannot save the machine's memory") from None

    def close(self) -> None:
        """See `engines.base.Writing`."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _open_base(directory: str) -> saved.Saved | None:
    """One that cannot be used is none: the save is then a whole one."""
    if not directory:
        return None
    try:
        found = saved.read(directory, check_memory=False)
    except NagayaError:
        return None
    if len(found.layers) >= saved.MOST_BASES:
        found.close()
        return None
    return found
