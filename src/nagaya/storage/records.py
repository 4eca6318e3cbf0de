"""Records on disk: NamedTuples as JSON files, replaced atomically and validated on load.

A field's annotation is its check: str, int, float, bool, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, NamedTuples.
Unknown keys are refused, missing ones take the field's default.
"""

from __future__ import annotations

import errno
import json
import os
import sys

from nagaya.errors import IntegrityError, UsageError
from nagaya.static import Any, TypeVar

MAX_BYTES = 4 << 20
T = TypeVar("T")
_kinds: dict[type, dict[str, Any]] = {}
_UNION: Any = type(int | None)


def to_data(value: Any) -> Any:
    """`value` as JSON-ready data: NamedTuples become objects, tuples arrays."""
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        if fields is not None:
            return {name: to_data(part) for name, part in zip(fields, value, strict=True)}
        return [to_data(part) for part in value]
    return value


def from_data(cls: type[T], data: object, *, what: str = "record") -> T:
    """Build a `cls` from JSON data. Raises `IntegrityError` naming the field that is wrong."""
    made: T = _build(cls, data, what)
    return made


def _build(kind: Any, data: Any, what: str) -> Any:
    if kind is float and type(data) is int:
        return float(data)
    if kind in (str, int, float, bool):
        if type(data) is not kind:
            raise IntegrityError(f"{what}: expected {kind.__name__}, found {type(data).__name__}")
        return data
    if isinstance(kind, _UNION):
        options = [option for option in kind.__args__ if option is not type(None)]
        return None if data is None else _build(options[0], data, what)
    if getattr(kind, "__origin__", None) is tuple:
        return _build_tuple(kind.__args__, data, what)
    fields = getattr(kind, "_fields", None)
    if fields is None:
        raise TypeError(f"{what}: no rule to load a {kind}")
    if not isinstance(data, dict):
        raise IntegrityError(f"{what}: expected an object")
    kinds = _kinds.get(kind)
    if kinds is None:
        # Annotations are text, which its own module explains: typing.get_type_hints, without the import of typing.
        names = vars(sys.modules[kind.__module__])
        kinds = _kinds[kind] = {name: eval(text, names) for name, text in kind.__annotations__.items()}
    unknown = set(data).difference(fields)
    missing = set(fields).difference(data, kind._field_defaults)
    if unknown or missing:
        raise IntegrityError(f"{what}: unexpected or missing {', '.join(sorted(unknown | missing))}")
    return kind(**{name: _build(kinds[name], part, f"{what}.{name}") for name, part in data.items()})


def _build_tuple(kinds: tuple[Any, ...], data: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise IntegrityError(f"{what}: expected an array")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_build(kinds[0], part, what) for part in data)
    if len(data) != len(kinds):
        raise IntegrityError(f"{what}: expected {len(kinds)} parts, found {len(data)}")
    return tuple(_build(kind, part, what) for kind, part in zip(kinds, data, strict=True))


def load(path: str, cls: type[T]) -> T:
    """Read and check a record. Raises `FileNotFoundError`, or `IntegrityError` for anything malformed."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        raw = os.read(fd, MAX_BYTES)
    finally:
        os.close(fd)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):  # the second: nested beyond reason
        raise IntegrityError(
            f"{path}: not valid JSON", hint="the file was damaged; remove the machine with 'nagaya rm -f'"
        ) from None
    return from_data(cls, data, what=path)


def store(path: str, value: object, *, durable: bool = False) -> None:
    """Replace the record at `path`. `durable` waits until it would survive a power cut (fsync: milliseconds).

    Raises `UsageError` for one that `load` would not read to its end.
    """
    data = json.dumps(to_data(value), separators=(",", ":")).encode()
    if len(data) > MAX_BYTES:
        raise UsageError(
            f"a record of {len(data) >> 20} MiB is more than a machine may have",
            hint="pass large values to the program in a file, or on its standard input",
        )
    write_file(path, data, durable=durable)


def overwrite(path: str, value: object) -> None:
    """Write a record over the one at `path`, in place: for a full disk, where a second file finds no room.

    Padded to the old one's length, and one write(2) within the block that the file has: it takes no space.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        data = json.dumps(to_data(value), separators=(",", ":")).encode().ljust(os.fstat(fd).st_size)
        if os.pwrite(fd, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(fd)


def write_file(path: str, data: bytes, *, durable: bool = False, mode: int = 0o600) -> None:
    """Replace a whole file by temporary file and rename; a reader sees the old or the new one, never a part."""
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
    if durable:
        sync(os.path.dirname(path) or ".")


def sync(path: str) -> None:
    """Bring a file to the host's disk, or of a directory the names in it. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
