"""The error tree. Every failure a user can meet is one of these; nothing else reaches the CLI.

Each error has a message (one sentence, no trailing full stop, no traceback) and, where there is something
to do about it, a hint. `exit_status` and `http_status` are the only tables that map them outwards.
"""

from __future__ import annotations


class NagayaError(Exception):
    """Base of the tree. `str(error)` is the one sentence; `hint` says what to do next, or is empty."""

    kind = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(NagayaError):
    """The caller asked for something malformed."""

    kind = "usage"


class NotFound(NagayaError):
    """The named machine, image, volume or path does not exist."""

    kind = "not-found"


class Conflict(NagayaError):
    """Right request, wrong moment. `state` is what was found, `required` what would have been accepted."""

    kind = "conflict"

    def __init__(self, message: str, *, hint: str = "", state: str = "", required: str = "") -> None:
        super().__init__(message, hint=hint)
        self.state = state
        self.required = required


class Unsupported(NagayaError):
    """This engine, host or user cannot do it. `finding` says how that was found out."""

    kind = "unsupported"

    def __init__(self, message: str, *, hint: str = "", finding: str = "") -> None:
        super().__init__(message, hint=hint)
        self.finding = finding


class HostError(NagayaError):
    """The kernel refused an operation. `operation`, `path` and `errno` say which and why."""

    kind = "host"

    def __init__(self, message: str, *, hint: str = "", operation: str = "", path: str = "", errno: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.operation = operation
        self.path = path
        self.errno = errno

    @classmethod
    def from_os(cls, error: OSError, operation: str, *, hint: str = "") -> HostError:
        """Translate an `OSError` at an engine's or store's entry; a full disk gets its usual hint."""
        import errno as numbers

        path = error.filename if isinstance(error.filename, str) else ""
        reason = error.strerror or str(error)
        if not hint and error.errno in (numbers.ENOSPC, numbers.EDQUOT):
            hint = "free some space, for example with 'nagaya prune', or choose another store with --root"
        elif not hint and error.errno in (numbers.EPERM, numbers.EACCES):
            hint = "run it as root, or check the owner and mode of the path"
        where = f" ({path})" if path else ""
        return cls(f"{operation}: {reason}{where}", hint=hint, operation=operation, path=path, errno=error.errno or 0)


class LaunchError(NagayaError):
    """A program that we started failed. `command`, `status` and `log_tail` say how."""

    kind = "launch"

    def __init__(self, message: str, *, hint: str = "", command: str = "", status: int = 0, log_tail: str = "") -> None:
        super().__init__(message, hint=hint)
        self.command = command
        self.status = status
        self.log_tail = log_tail


class ExecError(LaunchError):
    """The machine's program could not be executed: `status` is 126 (not executable) or 127 (not found)."""

    kind = "exec"


class RemoteError(NagayaError):
    """A registry, a guest agent or QMP answered with an error or broke its protocol."""

    kind = "remote"


class IntegrityError(NagayaError):
    """A digest, an image or stored state is malformed or does not match."""

    kind = "integrity"


EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_TOOL = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_SIGNAL_BASE = 128

_HTTP: dict[str, int] = {
    "usage": 400, "not-found": 404, "conflict": 409, "unsupported": 501,
    "host": 500, "launch": 500, "exec": 400, "remote": 502, "integrity": 500, "error": 500,
}  # fmt: skip

_KINDS: dict[str, type[NagayaError]] = {
    c.kind: c
    for c in (
        NagayaError, UsageError, NotFound, Conflict, Unsupported,
        HostError, LaunchError, ExecError, RemoteError, IntegrityError,
    )
}  # fmt: skip


def exit_status(error: NagayaError, *, runs_program: bool) -> int:
    """The CLI's exit status: `runs_program` for `run`, `exec`, `start -a`, whose own failures are 125."""
    if isinstance(error, ExecError):
        return error.status
    if isinstance(error, UsageError):
        return EXIT_TOOL if runs_program else EXIT_USAGE
    return EXIT_TOOL if runs_program else EXIT_FAILURE


def http_status(error: NagayaError) -> int:
    return _HTTP[error.kind]


def to_wire(error: NagayaError) -> dict[str, object]:
    """The error as JSON-ready data, to cross a socket; `from_wire` is its inverse."""
    return {"kind": error.kind, **error.__dict__}


def from_wire(data: object) -> NagayaError:
    """Rebuild an error that crossed a socket; anything malformed becomes a plain `RemoteError`."""
    if not isinstance(data, dict) or not isinstance(data.get("message"), str):
        return RemoteError("a supervisor sent a malformed error")
    made = _KINDS.get(str(data.get("kind")), NagayaError)(data["message"], hint=str(data.get("hint", "")))
    for name, now in list(made.__dict__.items()):
        sent = data.get(name)
        if type(sent) is type(now):
            setattr(made, name, sent)
    return made


class GuestFault(Exception):
    """A guest did what no correct driver does. `str(fault)` is one sentence for the log.

    Not a `NagayaError`: no user asked for anything wrong. It stops one device of one machine, and goes no further.
    """
