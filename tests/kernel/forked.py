"""Run a piece of a test in a forked child, which may change its namespaces, mounts and privileges as it likes."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_child(function: Callable[[], T]) -> T:
    """The function's answer, or its exception, from a child process that ends with it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            try:
                answer: tuple[bool, object] = (True, function())
            except BaseException as error:
                error.add_note(traceback.format_exc())
                answer = (False, error)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert data, f"the child ended with status {status} and no answer"
    good, value = pickle.loads(data)
    if not good:
        raise value
    return value  # type: ignore[no-any-return]
