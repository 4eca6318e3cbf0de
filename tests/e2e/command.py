"""The installed command, as a user has it: a process with arguments, streams and an exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any, NamedTuple

PROGRAM = os.path.join(os.path.dirname(sys.executable), "nagaya")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Cli:
    """`nagaya` on one store. Calling it runs a command line to its end; `popen` leaves it running."""

    def __init__(
        self, root: str, *, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None, cwd: str = "/"
    ) -> None:
        self.root = root
        self.prefix = prefix
        self.cwd = cwd
        self.env = {**os.environ, "NAGAYA_ROOT": root, "NO_COLOR": "1", **(env or {})}
        self.env.pop("NAGAYA_DEBUG", None)

    def argv(self, *argv: str) -> list[str]:
        return [*self.prefix, PROGRAM, *argv]

    def bytes(self, *argv: str, input: bytes = b"", timeout_s: float = 60) -> tuple[int, bytes, bytes]:
        """As `__call__`, but the streams are bytes. A command that takes too long is killed and fails the test."""
        process = subprocess.Popen(
            self.argv(*argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.env, cwd=self.cwd, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(input, timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        return code, out, err

    def __call__(self, *argv: str, input: str = "", timeout_s: float = 60) -> Ran:
        code, out, err = self.bytes(*argv, input=input.encode(), timeout_s=timeout_s)
        return Ran(code, out.decode(errors="replace"), err.decode(errors="replace"))

    def ok(self, *argv: str, input: str = "", timeout_s: float = 60) -> str:
        """Standard output of a command that must succeed."""
        ran = self(*argv, input=input, timeout_s=timeout_s)
        assert ran.code == 0, (argv, ran)
        return ran.out

    def json(self, *argv: str) -> Any:
        return json.loads(self.ok(*argv))

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(self.argv(*argv), env=self.env, cwd=self.cwd, **options)

    # -- what most tests begin with

    def run(self, *argv: str, input: str = "", flags: tuple[str, ...] = ()) -> Ran:
        """`run --rm` in busybox without a network."""
        return self("run", "--rm", "--network", "none", *flags, "busybox", *argv, input=input)

    def start(self, *argv: str, flags: tuple[str, ...] = ()) -> str:
        """`run -d` in busybox without a network; its id."""
        return self.ok("run", "-d", "--network", "none", *flags, "busybox", *(argv or ("sleep", "600"))).strip()

    def machines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json("ps", "-a", "--json")
        return found

    def machine_ids(self) -> list[str]:
        """Ids on disk, without asking the program under test; removals that were cut off included."""
        try:
            return sorted(os.listdir(f"{self.root}/machines"))
        except FileNotFoundError:
            return []
