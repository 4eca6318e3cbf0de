"""Reading and writing control files, and waiting for a group to become empty."""

from __future__ import annotations

import errno
import os
import select
import signal
import time

REMOVE_WITHIN_S = 5.0


def write(path: str, text: str) -> None:
    """One write(2) to a control file: the kernel takes each as one command."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def read(path: str) -> str:
    """A control file's text, or "" when this kernel does not have it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, 1 << 20).decode()
    except OSError as error:
        if error.errno == errno.ENODEV:  # the group was removed under us
            return ""
        raise
    finally:
        os.close(fd)


def number(path: str) -> int:
    """The one number in a file; -1 for a missing file, "max" and v1's "no limit"."""
    text = read(path).strip()
    value = int(text) if text.isdigit() else -1
    return -1 if value >= 1 << 60 else value


def table(path: str) -> dict[str, int]:
    """A file of `key value` lines."""
    pairs = (line.split() for line in read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def make(path: str) -> None:
    """Make a group's directory, and the parent that all machines share, when they are not there."""
    while True:
        try:
            os.mkdir(path, 0o755)
            return
        except FileExistsError:
            return
        except FileNotFoundError:
            try:
                os.mkdir(os.path.dirname(path), 0o755)
            except FileExistsError:
                continue  # made by another start, or just removed again by the last machine's end: once more


def processes(path: str) -> list[int]:
    return [int(line) for line in read(f"{path}/cgroup.procs").split() if line != "0"]


def kill_all(path: str) -> None:
    """SIGKILL to everything in the group, by pidfd: a pid is looked up again in the group before it is signalled."""
    for pid in processes(path):
        try:
            fd = os.pidfd_open(pid)
        except (ProcessLookupError, OSError):
            continue
        try:
            if pid in processes(path):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)


def wait_for_end(path: str, deadline: float) -> None:
    """Block until the processes that are in the group now have ended."""
    for pid in processes(path):
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0, int((deadline - time.monotonic()) * 1000)))
        finally:
            os.close(fd)


def remove(path: str) -> None:
    """rmdir, waiting for processes that are on their way out, and for the kernel that still counts them."""
    deadline = time.monotonic() + REMOVE_WITHIN_S
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:  # a machine made groups of its own in there
                for entry in os.scandir(path):
                    if entry.is_dir(follow_symlinks=False):
                        remove(entry.path)
                continue
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        kill_all(path)
        wait_for_end(path, deadline)
        # A zombie has left its pidfd's poll, but counts in the group until its parent reaps it: nothing tells when.
        time.sleep(0.001)


def remove_machine(path: str) -> None:
    """Remove a machine's group, and the parent behind the last machine."""
    remove(path)
    try:
        os.rmdir(os.path.dirname(path))
    except OSError:
        return  # other machines live there
