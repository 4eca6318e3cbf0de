"""`typing` for whoever starts quickly: type checkers see the real names, the interpreter light ones of the same behaviour.

Importing `typing` takes 7 ms, and each of its NamedTuple classes 0.2 ms, because their constructor is compiled from text.
Annotations are never evaluated here (`from __future__ import annotations`), so most names only have to exist.
`collections.abc` brings `collections`, 1 ms, for classes that every interpreter has loaded with `os`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable as Callable
    from collections.abc import Iterable as Iterable
    from collections.abc import Iterator as Iterator
    from collections.abc import Sequence as Sequence
    from typing import IO as IO
    from typing import Any as Any
    from typing import BinaryIO as BinaryIO
    from typing import Generic as Generic
    from typing import Literal as Literal
    from typing import NamedTuple as NamedTuple
    from typing import NoReturn as NoReturn
    from typing import Protocol as Protocol
    from typing import Self as Self
    from typing import TypeVar as TypeVar
    from typing import cast as cast
else:
    from _collections import _tuplegetter as field_at  # what collections.namedtuple makes its fields of
    from _collections_abc import Callable, Iterable, Iterator, Sequence  # noqa: F401

    class Generic:
        """Anything in brackets after it means nothing."""

        __slots__ = ()

        def __class_getitem__(cls, item):
            return cls

    class Protocol(Generic):
        __slots__ = ()

    IO = Literal = Generic
    Any = BinaryIO = NoReturn = Self = object

    def TypeVar(name, *constraints, **options):
        return name

    def cast(type_, value):
        return value

    def _make_constructor(name, fields, defaults):
        count = len(fields)
        known = frozenset(fields)
        new = tuple.__new__

        def __new__(cls, *values, **named):
            if len(values) == count and not named:
                return new(cls, values)
            if len(values) > count:
                raise TypeError(f"{name}() takes {count} values, and got {len(values)}")
            rest = fields[len(values) :]
            wrong = named.keys() - set(rest)
            if wrong:
                word = "two values for" if wrong & known else "an unexpected"
                raise TypeError(f"{name}() got {word} '{min(wrong)}'")
            try:
                return new(cls, (*values, *[named[key] if key in named else defaults[key] for key in rest]))
            except KeyError as missing:
                raise TypeError(f"{name}() needs {missing}") from None

        return __new__

    def _make(cls, values):
        return cls(*values)

    def _replace(self, /, **changes):
        values = [changes.pop(key, value) for key, value in zip(self._fields, self, strict=True)]
        if changes:
            raise ValueError(f"{type(self).__name__} has no field '{min(changes)}'")
        return tuple.__new__(type(self), values)

    def _asdict(self):
        return dict(zip(self._fields, self, strict=True))

    def _represent(self):
        values = ", ".join(f"{key}={value!r}" for key, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({values})"

    def _values(self):
        return tuple(self)

    _SHARED = {
        "__slots__": (), "__repr__": _represent, "__getnewargs__": _values, "_make": classmethod(_make), "_replace": _replace,
        "_asdict": _asdict,
    }  # fmt: skip

    class _NamedTupleType(type):
        def __new__(mcls, name, bases, namespace):
            fields = tuple(namespace.get("__annotations__", ()))
            defaults = {key: namespace[key] for key in fields if key in namespace}
            if fields[len(fields) - len(defaults) :] != tuple(defaults):
                raise TypeError(f"{name}: a field without a default follows one that has it")
            own = {key: field_at(index, "") for index, key in enumerate(fields)}
            facts = {
                "__new__": _make_constructor(name, fields, defaults), "__match_args__": fields, "_fields": fields,
                "_field_defaults": defaults, "__doc__": f"{name}({', '.join(fields)})",
            }  # fmt: skip
            return type(name, (tuple,), {**_SHARED, **facts, **namespace, **own})

    _BASE = type.__new__(_NamedTupleType, "NamedTuple", (), {})

    class _NamedTuple:
        """In a class's bases it stands for the type above, which makes a tuple of the class, and is gone."""

        def __mro_entries__(self, bases):
            return (_BASE,)

    NamedTuple = _NamedTuple()
