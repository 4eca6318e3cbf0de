"""The light NamedTuple behaves as typing's does."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import NamedTuple as Real

import pytest

from nagaya.static import NamedTuple as Light


class RealPoint(Real):
    """A point."""

    x: int
    y: int = 2
    tags: tuple[str, ...] = ()

    @property
    def sum(self) -> int:
        return self.x + self.y

    @classmethod
    def origin(cls) -> RealPoint:
        return cls(0, 0)


class LightPoint(Light):
    """A point."""

    x: int
    y: int = 2
    tags: tuple[str, ...] = ()

    @property
    def sum(self) -> int:
        return self.x + self.y

    @classmethod
    def origin(cls) -> LightPoint:
        return cls(0, 0)


class Empty(Light):
    pass


BOTH = pytest.mark.parametrize("point", [RealPoint, LightPoint])


@BOTH
def test_what_a_named_tuple_does(point: type[RealPoint]) -> None:
    one = point(1)
    assert one == (1, 2, ()) and isinstance(one, tuple) and hash(one) == hash((1, 2, ()))
    assert (one.x, one.y, one.tags, one.sum) == (1, 2, (), 3)
    assert point(1, tags=("a",)) == point(x=1, y=2, tags=("a",)) == (1, 2, ("a",))
    assert one._replace(y=5) == (1, 5, ()) and type(one._replace(y=5)) is point
    assert one._asdict() == {"x": 1, "y": 2, "tags": ()}
    assert point._make([1, 2, ()]) == one and type(point._make([1, 2, ()])) is point
    assert point._fields == ("x", "y", "tags") and point._field_defaults == {"y": 2, "tags": ()}
    assert repr(one) == f"{point.__name__}(x=1, y=2, tags=())"
    assert point.origin() == (0, 0, ()) and point.__doc__ == "A point."
    assert copy.deepcopy(one) == one and type(pickle.loads(pickle.dumps(one))) is point
    match one:
        case point(x, y):
            assert (x, y) == (1, 2)
    assert not hasattr(one, "__dict__")


@BOTH
def test_wrong_values_are_type_errors(point: type[RealPoint]) -> None:
    make = point  # the checker knows better
    for values, named in (((), {}), ((1, 2, (), 4), {}), ((1,), {"x": 2}), ((1,), {"z": 2}), ((), {"y": 1})):
        with pytest.raises(TypeError):
            make(*values, **named)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        point(1)._replace(z=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        point(1).x = 3  # type: ignore[misc]


def test_one_without_fields_and_one_in_the_wrong_order() -> None:
    assert Empty() == () and Empty.__doc__ == "Empty()"
    with pytest.raises(TypeError):
        type(Light.__mro_entries__(())[0])("Wrong", (), {"__annotations__": {"a": "int", "b": "int"}, "a": 1})  # type: ignore[attr-defined]


def test_typing_is_not_imported() -> None:
    program = "import sys, nagaya.static, nagaya.model.spec; sys.exit('typing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
