"""A file out of a Debian package that this host's own package sources have, for any suite: by apt, which checks it."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
from collections.abc import Iterable

from nagaya.errors import IntegrityError, LaunchError, NotFound, Unsupported
from nagaya.kernel.process import PR_SET_PDEATHSIG, prctl
from nagaya.static import IO, NamedTuple, cast

CHUNK = 1 << 20
_HINT = "check that 'apt-get update' works on this machine"


class Candidate(NamedTuple):
    """What apt would take. `digest`: SHA-256 of the package's file, in hex."""

    version: str
    digest: str


class Archive:
    """What apt knows of some sources, with lists and a cache of its own: what it knows of this host's packages stays as it is."""

    def __init__(self, lines: Iterable[str], place: str) -> None:
        """Fetch the lists to `place`. `lines`: as in sources.list(5). Raises `LaunchError`, and `Unsupported` without apt."""
        work = self._work = f"{place}/apt"
        for name in ("lists/partial", "cache/archives/partial"):
            os.makedirs(f"{work}/{name}")
        with open(f"{work}/sources.list", "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        options = (
            f"Dir::Etc::SourceList={work}/sources.list", "Dir::Etc::SourceParts=/dev/null", f"Dir::State::Lists={work}/lists",
            f"Dir::Cache={work}/cache", "Acquire::Languages=none", "APT::Update::Error-Mode=any", "APT::Sandbox::User=root",
        )  # fmt: skip
        self._options = ["-q", *(word for option in options for word in ("-o", option))]
        _run(["apt-get", *self._options, "update"], work, hint=_HINT)

    def find(self, package: str) -> Candidate:
        """Raises `NotFound` for a package that the sources do not have."""
        shown = _run(["apt-cache", *self._options, "show", "--no-all-versions", package], self._work, may_fail=True)
        fields = dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line and not line.startswith(" "))
        if "Version" not in fields or "SHA256" not in fields:
            raise NotFound(f"this host's package sources have no {package}")
        return Candidate(fields["Version"], fields["SHA256"])

    def download(self, package: str) -> str:
        """The path of the package's file, which apt has checked. Raises `LaunchError`."""
        _run(["apt-get", *self._options, "download", package], self._work, hint=_HINT)
        names = [name for name in os.listdir(self._work) if name.startswith(f"{package}_") and name.endswith(".deb")]
        if len(names) != 1:
            raise LaunchError(f"apt-get has not fetched {package}", command="apt-get download")
        return f"{self._work}/{names[0]}"


def extract(package: str, files: dict[str, str]) -> None:
    """Write files of the package at that path: {path inside: target}. Raises `IntegrityError` when one is not in it."""
    wanted = dict(files)
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", package], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=_die_with_us
    ) as unpacking:  # fmt: skip
        try:
            with tarfile.open(fileobj=cast("IO[bytes]", unpacking.stdout), mode="r|") as tar:
                for member in tar:
                    target = wanted.pop(member.name.removeprefix("./"), "")
                    content = tar.extractfile(member) if target and member.isreg() else None
                    if content is not None:
                        with open(target, "wb") as file:
                            while chunk := content.read(CHUNK):
                                file.write(chunk)
                    if not wanted:
                        break
        except tarfile.TarError as error:
            raise IntegrityError(f"'{package}' is damaged: {error}") from None
        finally:
            unpacking.kill()  # what is behind them nobody needs
    if wanted:
        raise IntegrityError(f"'{os.path.basename(package)}' has no {next(iter(wanted))}")


def _run(command: list[str], work: str, *, hint: str = "", may_fail: bool = False) -> str:
    try:
        done = subprocess.run(
            command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"}, preexec_fn=_die_with_us,
        )  # fmt: skip
    except FileNotFoundError:
        raise Unsupported("this host has no apt to fetch packages by") from None
    if done.returncode and not may_fail:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise LaunchError(
            f"{command[0]} {command[-1]}: {said[-1].removeprefix('E: ') if said else done.returncode}", hint=hint,
            command=" ".join(command), status=done.returncode, log_tail=done.stderr[-2000:],
        )  # fmt: skip
    return done.stdout


def _die_with_us() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
