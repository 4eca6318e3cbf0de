"""The programs of one running machine: between the agent's channels and the clients that look at them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from nagaya.errors import ExecError, LaunchError, NagayaError, RemoteError
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Process
from nagaya.protocol import agent
from nagaya.static import Protocol
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.storage.logs import LogWriter
    from nagaya.supervisor.resuming import CarriedPrograms, SavedPrograms


class Listener(Protocol):
    """What a program speaks to: a client on a socket, or whatever behaves like one."""

    program: Program | None
    wants_stdin: bool

    @property
    def congested(self) -> bool:
        """Whether it reads more slowly than the program writes."""

    def output(self, stream: int, data: bytes) -> None: ...
    def consumed_stdin(self, count: int) -> None:
        """So much of its input has gone on to the program."""


class Link(Protocol):
    """Where a program's input goes and its output comes from: the agent's, or a console."""

    def grant(self, channel: int, count: int) -> None: ...
    def send_stdin(self, channel: int, data: bytes) -> int: ...
    def close_stdin(self, channel: int) -> None: ...
    def signal(self, channel: int, number: int) -> None: ...
    def resize(self, channel: int, rows: int, columns: int) -> None: ...


class Owner(Protocol):
    """What a program belongs to."""

    @property
    def link(self) -> Link: ...
    def flush(self) -> None: ...


class Program:
    """One program and who is attached to it. Output is lossless: a client that does not read holds it back."""

    def __init__(self, owner: Owner, channel: int, *, wants_stdin: bool, tty: bool, log: LogWriter | None) -> None:
        self._owner = owner
        self._log = log
        self._owed = 0
        self._stdin: deque[tuple[Listener, bytes]] = deque()
        self._stdin_ending = not wants_stdin
        self.channel = channel
        self.tty = tty
        self.clients: list[Listener] = []
        self.on_started: Callable[[int], None] = lambda pid: None
        self.on_failed: Callable[[NagayaError], None] = lambda problem: None
        self.on_exited: Callable[[int], None] = lambda status: None

    def join(self, client: Listener, *, stdin: bool) -> None:
        client.program = self
        client.wants_stdin = stdin
        self.clients.append(client)

    def leave(self, client: Listener) -> None:
        """The client is gone. Its half-sent input is not; a program without a terminal then sees end of input."""
        if client in self.clients:
            self.clients.remove(client)
        if client.wants_stdin and not self.tty:
            self.end_stdin(client)
        self.grant()

    def succeed(self, former: Program) -> None:
        """Be the next run of what `former` was one of: with its clients, the input that it has not taken, and the end of that."""
        for client in former.clients:
            self.join(client, stdin=client.wants_stdin)
        self._stdin.extend(former._stdin)
        self._stdin_ending |= former._stdin_ending and any(client.wants_stdin for client in former.clients)
        self.pump_stdin()

    def output(self, stream: int, data: bytes) -> None:
        if self._log is not None:
            self._log.write(stream, data)
        for client in self.clients:
            client.output(stream, data)
        self._owed += len(data)
        self.grant()

    def grant(self) -> None:
        """Let the agent send more, unless an attached client is still congested."""
        if self._owed and not any(client.congested for client in self.clients):
            owed, self._owed = self._owed, 0
            self._owner.link.grant(self.channel, owed)
            self._owner.flush()

    def feed(self, client: Listener, data: bytes) -> None:
        """Input from a client; credit returns to it as the agent takes it."""
        if not data:
            return  # of which none would ever be taken
        if self._stdin_ending or not client.wants_stdin:
            client.consumed_stdin(
                len(data)
            )  # the program has no input (any more): swallow it, as a pipe's writer expects
            return
        self._stdin.append((client, data))
        self.pump_stdin()

    def end_stdin(self, client: Listener) -> None:
        if client.wants_stdin and not self._stdin_ending:
            self._stdin_ending = True
            if not self._stdin:
                self._owner.link.close_stdin(self.channel)
                self._owner.flush()

    def pump_stdin(self) -> None:
        while self._stdin:
            client, data = self._stdin[0]
            taken = self._owner.link.send_stdin(self.channel, data)
            if not taken:
                break
            client.consumed_stdin(taken)
            if taken < len(data):
                self._stdin[0] = (client, data[taken:])
                break
            self._stdin.popleft()
        if self._stdin_ending and not self._stdin:
            self._owner.link.close_stdin(self.channel)
        self._owner.flush()

    def signal(self, number: int) -> None:
        self._owner.link.signal(self.channel, number)
        self._owner.flush()

    def resize(self, rows: int, columns: int) -> None:
        if self.tty:
            self._owner.link.resize(self.channel, rows, columns)
            self._owner.flush()


class Programs:
    """Speaks to the agent. `on_lost(error)` is called once, when the agent's stream ends or breaks its protocol."""

    def __init__(self, loop: Loop, agent_fd: int, *, on_lost: Callable[[NagayaError | None], None]) -> None:
        self.link = agent.AgentLink()
        self._programs: dict[int, Program] = {}
        self._on_lost = on_lost
        self._problem: NagayaError | None = None
        self.out_of_memory = False  # whether the machine's own kernel has killed a process for want of memory
        self.on_set_up: Callable[[tuple[str, ...]], None] = lambda warnings: None
        self.on_continued: Callable[[tuple[str, ...]], None] = lambda warnings: None
        self._on_held: Callable[[int], None] = lambda errno: None
        self._stream = Stream(loop, agent_fd, on_data=self._received, on_closed=self._closed, on_drained=self.flush)

    def setup(self, payload: bytes, *, sent: bool = False) -> None:
        """Have the agent make the machine's inside: before any `spawn`. `on_set_up(warnings)`, or `on_lost`, follows.

        `sent`: see `AgentLink.setup`.
        """
        self.link.setup(payload, sent=sent)
        self.flush()

    def set_clock(self, time_ns: int) -> None:
        """Put the clock right of a machine that has one of its own."""
        self.link.set_clock(time_ns)
        self.flush()

    def spawn(
        self,
        process: Process,
        policy: ProcessPolicy,
        *,
        main: bool = False,
        applet: bool = False,
        discard: bool = False,
        data_disk: bool = False,
        log: LogWriter | None = None,
    ) -> Program:
        """Ask the agent to run `process`; the program's callbacks say what came of it."""
        channel = self.link.spawn(process, policy, main=main, applet=applet, discard=discard, data_disk=data_disk)
        program = Program(self, channel, wants_stdin=process.stdin, tty=process.tty, log=log)
        self._programs[channel] = program
        return program

    # -- being held, and going on

    def hold(self, on_held: Callable[[int], None]) -> None:
        """Bring the agent to rest: `on_held(errno)` when nothing is under way any more. What clients ask waits until `go_on`."""
        self._on_held = on_held
        self.link.hold()
        self.flush()

    def go_on(self, payload: bytes) -> None:
        """Let the agent go on; `payload` as `AgentLink.go_on` takes it. `on_continued(warnings)` follows."""
        self.link.go_on(payload)
        self.flush()

    def save(self, main: Program | None) -> SavedPrograms:
        """What `resume` goes on with. While the agent is held."""
        from nagaya.supervisor.resuming import SavedProgram, SavedPrograms  # lazy: only snapshots

        programs = tuple(
            SavedProgram(one.channel, one is main, one.tty, not one._stdin_ending, one._owed)
            for one in self._programs.values()
        )
        return SavedPrograms(self.link.save(), programs, self.out_of_memory)

    def freeze(self) -> None:
        """Say nothing to the agent until `thaw`; what it says is heard."""
        self._stream.freeze()

    def thaw(self, first: bytes) -> None:
        """Go on; `first` is what had been said, and did not reach it."""
        self._stream.thaw(first)
        self.flush()

    def carry(self, main: Program | None, first: bytes) -> CarriedPrograms:
        """What `resume_carried` goes on with on another host, while frozen; the machine stands. `first` as `thaw` has it.

        Raises `RemoteError` when the agent's stream breaks, `ValueError` as `AgentLink.carry`.
        """
        from nagaya.supervisor.resuming import CarriedPrograms, SavedProgram, SavedPrograms  # lazy: migrations alone

        self._drain()
        if not self._stream.open:
            raise RemoteError("the machine is just ending")
        link, begun, unsent = self.link.carry()
        programs = tuple(
            SavedProgram(one.channel, one is main, one.tty, not one._stdin_ending, one._owed)
            for one in self._programs.values()
        )
        saved = SavedPrograms(link, programs, self.out_of_memory)
        return CarriedPrograms(saved, begun.hex(), (first + self._stream.waiting() + unsent).hex())

    def resume_carried(self, carried: CarriedPrograms, *, log: LogWriter) -> Program:
        """Go on with what another host has carried here; answers the main program. Raises as `AgentLink.carried`."""
        link = agent.AgentLink.carried(carried.saved.link, bytes.fromhex(carried.begun), bytes.fromhex(carried.unsent))
        main = self.resume(carried.saved, log=log, link=link)
        self.flush()
        return main

    def resume(self, saved: SavedPrograms, *, log: LogWriter, link: agent.AgentLink | None = None) -> Program:
        """Go on with what was saved, before anything else is asked for; answers the main program.

        Nobody is attached: whoever fed a program's pipe is not there, so it has ended, but for the main program's.
        """
        self.link = link or agent.AgentLink.resumed(saved.link)
        self.out_of_memory = saved.out_of_memory
        found = None
        for one in saved.programs:
            program = Program(self, one.channel, wants_stdin=one.stdin, tty=one.tty, log=log if one.main else None)
            program._owed = one.owed
            self._programs[one.channel] = program
            if one.main:
                found = program
            elif one.stdin and not one.tty:
                program._stdin_ending = True
                self.link.close_stdin(one.channel)
        assert found is not None  # `resuming.load` has looked
        for program in self.running():
            program.grant()
        return found

    def running(self) -> list[Program]:
        return list(self._programs.values())

    def shutdown(self) -> None:
        self.link.shutdown()
        self.flush()

    def flush(self) -> None:
        """Write what the link has queued, unless the stream is still busy with earlier bytes."""
        while self._stream.open and not self._stream.queued:
            data = self.link.outgoing()
            if not data:
                return
            self.link.sent(len(data))
            self._stream.send(data)

    def close(self) -> None:
        """Take what the agent still said, then close."""
        self._drain()
        self._stream.close()

    def _drain(self) -> None:
        before = -1
        while self._stream.open and before != self._seen:
            before = self._seen
            self._stream.receive()

    _seen = 0

    def _received(self, data: bytes) -> None:
        self._seen += len(data)
        try:
            events = self.link.receive(data)
        except RemoteError as problem:
            self._problem = problem
            self._stream.close()
            return
        for event in events:
            self._handle(event)
            if isinstance(event, agent.SetupFailed):
                self._problem = LaunchError(f"the machine cannot be set up: {event.text}")
                self._stream.close()
                return
        self.flush()

    def _handle(self, event: agent.Event) -> None:
        if isinstance(event, agent.Hello):
            self.link.stamp(time.time_ns())
            return
        if isinstance(event, agent.SetupFailed):
            return
        if isinstance(event, agent.OutOfMemory):
            self.out_of_memory = True
            return
        if isinstance(event, agent.SetUp):
            self.on_set_up(event.warnings)
            return
        if isinstance(event, agent.Held):
            self._on_held(event.errno)
            return
        if isinstance(event, agent.Continued):
            self.on_continued(event.warnings)
            return
        program = self._programs.get(event.channel)
        if program is None:
            return
        if isinstance(event, agent.Output):
            program.output(event.stream, event.data)
        elif isinstance(event, agent.StdinRoom):
            program.pump_stdin()
        elif isinstance(event, agent.Started):
            program.on_started(event.pid)
        elif isinstance(event, agent.SpawnFailed):
            del self._programs[event.channel]
            program.on_failed(_spawn_error(event))
        else:
            del self._programs[event.channel]
            program.on_exited(event.status)

    def _closed(self) -> None:
        self._on_lost(self._problem)


def _spawn_error(event: agent.SpawnFailed) -> NagayaError:
    if event.status == 127:
        return ExecError(event.text, status=127, hint="check the command's name, and PATH inside the image")
    if event.status == 126:
        return ExecError(event.text, status=126, hint="the file must be executable and for this platform")
    return LaunchError(event.text)
