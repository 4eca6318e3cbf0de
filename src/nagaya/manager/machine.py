"""One machine, as the CLI and the library hold it: a handle, not a copy. Every property tells the truth of now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nagaya.engines.base import Stats
from nagaya.errors import Conflict, NagayaError, NotFound, RemoteError, Unsupported, UsageError
from nagaya.manager import repair
from nagaya.manager.attachment import Attachment, Connection, Copies, ask, connect
from nagaya.manager.creating import plan_exec
from nagaya.manager.naming import check_name
from nagaya.manager.options import ExecOptions, UpdateOptions
from nagaya.model.spec import MachineSpec, Process
from nagaya.model.state import ALIVE, RUNNING, MachineState, require
from nagaya.protocol import control
from nagaya.static import NamedTuple, Protocol
from nagaya.storage import events, machines, rootfs
from nagaya.storage.lock import FileLock
from nagaya.storage.logs import LogLine
from nagaya.storage.migrations import refuse_left
from nagaya.storage.paths import Paths
from nagaya.storage.records import from_data, to_data
from nagaya.supervisor.launch import launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.changes import Change
    from nagaya.images.progress import Progress
    from nagaya.images.store import Image, ImageStore
    from nagaya.manager.front import FrontPanel
    from nagaya.manager.migrating import Sent
    from nagaya.manager.processes import ProcessRow
    from nagaya.manager.snapshots import Snapshots


class Store(Protocol):
    """What a machine needs of the host that it belongs to."""

    @property
    def images(self) -> ImageStore: ...


class Completed(NamedTuple):
    """A program that ran to its end."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class Machine:
    """A machine of one store. Methods raise the errors of `nagaya.errors`; `NotFound` once it has been removed."""

    def __init__(self, paths: Paths, spec: MachineSpec, *, store: Store) -> None:
        self.paths = paths
        self.store = store
        self._held: FileLock | None = None
        self.spec = spec

    def __repr__(self) -> str:
        return f"<Machine {self.name} {self.id[:12]}>"

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def directory(self) -> str:
        return self.paths.machine(self.id)

    @property
    def state(self) -> MachineState:
        """What has become of it. A machine whose supervisor was killed is repaired and shown as exited."""
        state = repair.settle(self.paths, self.spec)
        if state is None:
            raise NotFound(f"machine '{self.name}' has been removed")
        return state

    # -- life cycle

    def hold(self, lock: FileLock) -> None:
        """Keep the command lock of a machine that has just been created until its first `start`."""
        self._held = lock

    def let_go(self) -> None:
        """Give up the lock of `hold`, if it is still held."""
        lock, self._held = self._held, None
        if lock is not None:
            lock.release()

    def start(
        self, *, attach: bool = False, rows: int = 0, columns: int = 0, progress: Progress | None = None
    ) -> Attachment | None:
        """Boot it and wait until its program runs. With `attach`, its streams from the very first byte.

        `progress` sees the volumes that are copied in meanwhile, where nothing can share them.
        Raises `ExecError` when the program cannot be executed, `Conflict` when it is running already.
        """
        return self.go(attach=attach, rows=rows, columns=columns, progress=progress)

    def go(
        self,
        *,
        attach: bool = False,
        rows: int = 0,
        columns: int = 0,
        saved: str = "",
        progress: Progress | None = None,
    ) -> Attachment | None:
        """`start`; with the directory of a snapshot in `saved` from its memory, which the caller has checked."""
        connection = self.begin(attach=attach, rows=rows, columns=columns, saved=saved)
        answer = self.await_start(connection, Copies(progress).take if progress is not None else None)
        warnings = tuple(str(warning) for warning in _list(answer.get("warnings")))
        if attach:
            return Attachment(connection, warnings=warnings)
        connection.close()
        return None

    def begin(self, *, attach: bool = False, rows: int = 0, columns: int = 0, saved: str = "") -> Connection:
        """The first half of `go`: its supervisor is there, and at work. `await_start` is to follow."""
        fresh, self._held = self._held, None
        lock = fresh or self.lock()
        try:
            if fresh is None:
                require("start", self.settled().phase, self.name)
                refuse_left(self.directory, self.name)
            fd = launch(self.paths, self.id, command=lock, attach=attach, size=(rows, columns), saved=saved)
        except BaseException:
            lock.release()
            raise
        self._held = lock
        return Connection(fd)

    def await_start(
        self, connection: Connection, take: Callable[[dict[str, object]], None] | None = None
    ) -> dict[str, object]:
        """Until it runs: what its supervisor says. Raises why it does not; the connection is closed then."""
        try:
            return connection.answer(take)
        except BaseException:
            connection.close()
            raise
        finally:
            self.let_go()

    def stop(self, *, timeout_s: float | None = None) -> None:
        """Send its stop signal, kill it after `timeout_s`, and wait until nothing of it runs. Fine when it has ended."""
        with self.lock():
            if self.settled().phase not in ALIVE:
                return
            seconds = self.spec.stop_timeout_s if timeout_s is None else timeout_s
            self._ask_end("stop", timeout_ms=int(seconds * 1000))
            self._mend()

    def kill(self, signal: int = 9) -> None:
        """Send a signal to its program; SIGKILL ends the machine and waits for that."""
        require("kill", self.state.phase, self.name)
        if signal == 9:
            self._ask_end("kill", signal=9)
            repair.settle(self.paths, self.spec)
        else:
            self.ask("kill", signal=signal)

    def restart(self, *, timeout_s: float | None = None) -> None:
        """Stop it if it runs, then start it."""
        self.stop(timeout_s=timeout_s)
        self.start()

    def pause(self) -> None:
        """Freeze all its processes."""
        require("pause", self.state.phase, self.name)
        self.ask("pause")

    def unpause(self) -> None:
        require("unpause", self.state.phase, self.name)
        self.ask("unpause")

    @property
    def snapshots(self) -> Snapshots:
        """What it was at earlier times, to go back to."""
        from nagaya.manager.snapshots import Snapshots  # lazy: most commands have nothing to do with them

        return Snapshots(self)

    def fork(self, count: int = 1, *, name: str = "", disk_only: bool = False) -> list[Machine]:
        """Further machines that go on from where this one is. See `manager/forking.py`."""
        from nagaya.manager.forking import fork  # lazy: only who forks
        from nagaya.manager.machines import Machines

        return fork(self, Machines(self.paths, self.store), count, name=name, disk_only=disk_only)

    def migrate(
        self, to: str, *, max_downtime_ms: int = 100, post_copy: bool = False,
        on_progress: Callable[[dict[str, object]], None] | None = None,
    ) -> Sent:  # fmt: skip
        """Send it to another Nagaya, which receives at the address `to`. See `manager/migrating.py`."""
        from nagaya.manager import migrating  # lazy: only who migrates
        from nagaya.migration.addresses import parse_address
        from nagaya.migration.departure import Terms

        return migrating.send(self, parse_address(to), Terms(max_downtime_ms, post_copy), on_progress=on_progress)

    def wait(self) -> int:
        """Block until it has ended for good; its exit status."""
        state = self.state
        if state.phase in ALIVE:
            try:
                answer = self.ask("wait")
                return int(str(answer.get("exit_code")))
            except (Conflict, RemoteError):
                state = self.state  # it ended, or was killed, between our look and our question
        return state.exit_code

    def remove(self, *, force: bool = False, volumes: bool = False) -> None:
        """Remove it and its data. `force` kills it first; `volumes` removes its anonymous volumes as well."""
        with self.lock():
            state = self.settled()
            if state.phase in ALIVE:
                if not force:
                    require("remove", state.phase, self.name)
                self._ask_end("kill", signal=9)
                self._mend()
                if not os.path.exists(self.directory):
                    return  # created with --rm: it is removed by now
            self.reload()  # its name, should it have been given another since
            if volumes or self.spec.auto_remove:
                rootfs.remove_anonymous_volumes(self.paths, self.spec)  # first: with the record goes the knowledge
            machines.discard(self.paths, self.id, self.name)
        self.record("destroy")

    def rename(self, name: str) -> None:
        """Give it another name. The old one is free afterwards."""
        check_name(name)
        with self.lock():
            self.reload()
            old = self.name
            if name == old:
                return
            machines.claim_name(self.paths, name, self.id)
            self.spec = self.spec._replace(name=name)
            machines.store_spec(self.paths, self.spec)
            machines.release_name(self.paths, old, self.id)
            if self.settled().phase in ALIVE:
                self.ask("update")
        self.record("rename", old=old)

    def update(self, options: UpdateOptions) -> list[str]:
        """Change limits and restart policy, and the type and the disk's size of one that does not run.

        Answers a sentence for each change, saying when it holds.
        """
        from nagaya.manager.updating import describe, plan_update  # lazy: rare

        with self.lock():
            self.reload()
            if options.type is not None or options.storage_bytes is not None:
                self.need_agent(
                    "change its type or storage", instead="'nagaya machine resize-disk' makes a disk larger"
                )
            planned, note = plan_update(self.spec, options)
            if planned == self.spec:
                raise UsageError(
                    f"nothing to update: {note}" if note else "nothing to update",
                    hint="for example --memory 512m or --restart always",
                )
            before = self.spec
            alive = self.settled().phase in ALIVE
            notes = [note] if note else []
            if planned.type != before.type or planned.limits.storage_bytes != before.limits.storage_bytes:
                from nagaya.manager.retyping import rebuild  # lazy: rarer still

                rebuild(self, planned, alive=alive)
            self.spec = planned
            machines.store_spec(self.paths, planned)
            if alive:
                try:
                    told = self.ask("update").get("told")
                    notes += [str(line) for line in told] if isinstance(told, list) else []
                except NagayaError:
                    self.spec = before
                    machines.store_spec(self.paths, before)
                    raise
        self.record("update")
        return describe(before, planned, alive=alive) + notes

    def change(self, planned: MachineSpec, op: str, network: str) -> str:
        """Store a record with another set of networks, under the command lock, and carry that out if it runs.

        `op` is "plug" or "unplug". Answers "now", perhaps with what does not follow, or why it waits for the next start.
        """
        before, self.spec = self.spec, planned
        alive = self.settled().phase in ALIVE
        machines.store_spec(self.paths, planned)
        if not alive:
            return "from the next start"
        try:
            problem = self.ask(op, network=network).get("problem")
        except Unsupported as reason:
            return f"from the next start: {reason.message}"
        except BaseException:
            self.spec = before
            machines.store_spec(self.paths, before)
            raise
        return f"now; {problem}" if problem else "now"

    # -- programs

    def attach(self, *, stdin: bool = True) -> Attachment:
        """The streams of its main program from now on."""
        require("attach", self.state.phase, self.name)
        connection = connect(self.runtime_dir, self.name)
        return self._stream(connection, control.request("attach", stdin=stdin))

    def exec(self, options: ExecOptions, *, detach: bool = False) -> Attachment | None:
        """Run a further program in it. Raises `ExecError` when it cannot be executed."""
        self.need_agent("start programs in it")
        require("exec", self.state.phase, self.name)
        process = plan_exec(options, self.spec.process)
        connection = connect(self.runtime_dir, self.name)
        request = control.request("exec", process=to_data(process), detach=detach)
        if not detach:
            return self._stream(connection, request)
        try:
            connection.send(request)
            connection.answer()
        finally:
            connection.close()
        return None

    def run(
        self,
        argv: tuple[str, ...] | list[str],
        *,
        stdin: bytes = b"",
        env: tuple[str, ...] = (),
        user: str | None = None,
        workdir: str | None = None,
        timeout_s: float | None = None,
    ) -> Completed:
        """Execute a program to its end and collect its output."""
        options = ExecOptions(tuple(argv), env=env, user=user, workdir=workdir, stdin=bool(stdin))
        attachment = self.exec(options)
        assert attachment is not None
        with attachment:
            return Completed(*attachment.communicate(stdin, timeout_s=timeout_s))

    def applet(self, argv: tuple[str, ...], *, stdin: bool = False, data_disk: bool = False) -> Attachment:
        """One of the agent's own functions (docs/agent-protocol.md): what `top` and `cp` are made of."""
        self.need_agent("look into it")
        connection = connect(self.runtime_dir, self.name)
        process = Process(argv=argv, stdin=stdin)
        return self._stream(
            connection, control.request("exec", process=to_data(process), applet=True, data_disk=data_disk)
        )

    def top(self) -> list[ProcessRow]:
        """Its processes."""
        require("top", self.state.phase, self.name)
        from nagaya.manager.processes import list_processes  # lazy: only `top` lists

        return list_processes(self)

    @property
    def front(self) -> FrontPanel:
        """Screen, keyboard and login of a whole machine. Raises `Unsupported` for one that was made from an image."""
        from nagaya.manager.front import FrontPanel  # lazy: whole machines alone

        return FrontPanel(self)

    # -- looking at it

    def stats(self) -> Stats:
        """One reading of its use of resources."""
        require("stats", self.state.phase, self.name)
        reading = from_data(Stats, self.ask("stats"), what="stats")
        if reading.pids < 0 and self.state.phase == RUNNING:  # only its own kernel knows its processes
            from nagaya.manager.processes import count_processes  # lazy: a virtual machine's only

            reading = reading._replace(pids=count_processes(self))
        return reading

    def logs(self, *, follow: bool = False, since_ns: int = 0, until_ns: int = 0, tail: int = -1) -> Iterator[LogLine]:
        """Its output so far (the last `tail` lines of it), and with `follow` what comes until it ends."""
        from nagaya.manager.logs import read_logs  # lazy: only `logs` reads

        return read_logs(self, follow=follow, since_ns=since_ns, until_ns=until_ns, tail=tail)

    def inspect(self) -> dict[str, object]:
        """Everything about it, JSON-ready."""
        from nagaya.engines import engine_of  # lazy: an engine is large
        from nagaya.engines.base import FEATURES

        state = self.state
        spec: dict[str, object] = to_data(self.spec)
        spec["labels"] = dict(self.spec.labels)
        spec["sysctls"] = dict(self.spec.sysctls)
        missing = engine_of(self.spec).missing
        return {
            **spec,
            "state": {**to_data(state), "warnings": list(state.warnings)},
            "links": self._links(),
            **({"guest_links": self.front.find_guest_links()} if self.spec.hardware is not None else {}),
            "directory": self.directory,
            "log_path": f"{self.directory}/log",
            "snapshots": [snapshot.name for snapshot in self.snapshots.list()],
            "capabilities": [feature for feature in FEATURES if feature not in missing],
            "missing": dict(missing),
        }

    # -- files

    def copy_out(self, source: str, target: str, *, follow_links: bool = False, archive: bool = False) -> None:
        """Copy `source` inside the machine to `target` on the host. `archive` keeps owners."""
        from nagaya.manager import copying  # lazy: only `cp` copies

        copying.copy_out(self, source, target, follow_links=follow_links, archive=archive)

    def copy_in(self, source: str, target: str, *, follow_links: bool = False, archive: bool = False) -> None:
        """Copy `source` on the host to `target` inside the machine. `archive` keeps owners."""
        from nagaya.manager import copying

        copying.copy_in(self, source, target, follow_links=follow_links, archive=archive)

    def tar_out(self, source: str, out: int, *, mounts: bool = True) -> None:
        """Write `source` inside the machine as a tar stream to descriptor `out`.

        Without `mounts` what is mounted below it (/proc, volumes) is an empty directory or file in the archive.
        """
        from nagaya.manager import copying

        copying.tar_out(self, source, out, mounts=mounts)

    def tar_in(self, target: str, source: int) -> None:
        """Unpack a tar stream from descriptor `source` into the directory `target` inside the machine."""
        from nagaya.manager import copying

        copying.tar_in(self, target, source)

    def diff(self) -> list[Change]:
        """What the machine has changed of its image: A added, C changed, D deleted."""
        self.need_agent("tell what it has changed")
        from nagaya.images.changes import diff

        self.reload()
        with self._changes() as upper:
            return diff(upper, rootfs.load_layers(self.directory))

    def commit(
        self, reference: str, *, author: str = "", message: str = "", changes: tuple[str, ...] = (), pause: bool = True
    ) -> Image:
        """Make an image of its changes. `pause` freezes it meanwhile, if it runs."""
        self.need_agent("make an image of it", instead="'nagaya disk convert' makes a disk of its disk")
        base = self.store.images.get(self.spec.image_id)
        # The agent, which tells what is on a machine's own disk, would be frozen with it.
        frozen = pause and self.state.phase == "running" and not self._has_disk()
        if frozen:
            self.pause()
        try:
            with self._changes() as upper:
                return self.store.images.commit(
                    base, upper, rootfs.load_layers(self.directory), reference,
                    author=author, message=message, changes=changes,
                )  # fmt: skip
        finally:
            if frozen:
                self.unpause()

    # -- inside

    def _links(self) -> list[dict[str, object]]:
        """What it has on its networks while it runs: addresses, MAC, names."""
        from nagaya.net import live  # lazy: only `inspect` asks

        plan = live.load(self.paths, self.id)
        links: list[dict[str, object]] = [to_data(link) for link in plan.links] if plan is not None else []
        return links

    def need_agent(self, what: str, *, instead: str = "") -> None:
        """Raise `Unsupported` for a whole machine: nothing of ours is inside it that could do `what`."""
        if self.spec.hardware is not None:
            raise Unsupported(
                f"machine '{self.name}' is a whole machine with a system of its own: Nagaya cannot {what}",
                hint=instead or f"'nagaya attach {self.name}' shows its serial console",
            )

    def _has_disk(self) -> bool:
        """Whether it keeps its changes on a disk of its own."""
        from nagaya.engines import engine_of  # lazy: only who looks at its changes

        return engine_of(self.spec).rootfs_kind == "disk"

    @contextmanager
    def _changes(self) -> Iterator[str]:
        """A directory with what it has changed of its image, as overlayfs keeps it. A virtual machine's is a copy."""
        upper, has_disk = f"{self.directory}/upper", self._has_disk()
        if not has_disk and os.path.isdir(upper):
            yield upper
            return
        from nagaya.manager.copying import copy_changes
        from nagaya.storage.tree import remove_tree

        place = f"{self.directory}/changes-{os.getpid()}.tmp"
        try:
            remove_tree(place)
            os.mkdir(place, 0o700)
            if has_disk:  # else it was never started, and nothing has changed
                copy_changes(self, place)
            yield place
        finally:
            remove_tree(place)

    @property
    def images(self) -> ImageStore:
        """The images of its store."""
        return self.store.images

    @property
    def runtime_dir(self) -> str:
        return self.paths.runtime(self.id)

    def lock(self) -> FileLock:
        """Take its command lock: nobody else changes it until the lock is released."""
        lock = machines.command_lock(self.paths, self.id)
        try:
            lock.acquire()
        except FileNotFoundError:
            raise NotFound(f"machine '{self.name}' has been removed") from None
        try:
            repair.mend_snapshots(self.directory)
        except BaseException:
            lock.release()
            raise
        return lock

    def end(self, *, keep: bool) -> None:
        """Kill it, under the command lock, and wait until nothing of it is left. With `keep` it stays, be it one of --rm."""
        self._ask_end("kill", signal=9, keep=keep)
        self._mend()

    def settled(self) -> MachineState:
        """The true state, while we hold the command lock ourselves."""
        try:
            state = repair.read_state(self.paths, self.id)
            if state.phase in ALIVE and not machines.is_alive(self.paths, self.id):
                repaired = repair.repair(self.paths, self.spec)
                if repaired is None:
                    raise NotFound(f"machine '{self.name}' has been removed")
                state = repaired
        except FileNotFoundError:
            raise NotFound(f"machine '{self.name}' has been removed") from None
        return state

    def reload(self) -> None:
        try:
            self.spec = machines.load_spec(self.paths, self.id)
        except FileNotFoundError:
            raise NotFound(f"machine '{self.name}' has been removed") from None

    def ask(self, op: str, **arguments: object) -> dict[str, object]:
        return ask(self.runtime_dir, self.name, op, **arguments)

    def _ask_end(self, op: str, **arguments: object) -> None:
        """A request whose answer is the machine's end; its supervisor being killed meanwhile is an end as well."""
        try:
            self.ask(op, **arguments)
        except (Conflict, RemoteError):
            if not repair.has_ended(self.paths, self.id):
                raise

    def _mend(self) -> None:
        """Behind `_ask_end`, under the command lock: a supervisor that was killed instead of ending left things behind."""
        try:
            self.settled()
        except NotFound:
            return  # it was created with --rm: its supervisor, or the repair just now, has removed it

    def _stream(self, connection: Connection, request: bytes) -> Attachment:
        try:
            connection.send(request)
            connection.answer()
        except BaseException:
            connection.close()
            raise
        return Attachment(connection)

    def record(self, action: str, **attributes: str) -> None:
        events.record(self.paths.events, "machine", action, self.id, self.name, image=self.spec.image, **attributes)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
