"""The supervisor of one machine: boots it, serves its control socket, reaps it, restarts it, cleans up after it.

It holds the machine's liveness lock from before the boot until nothing of the machine is left on the host.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack

from nagaya.engines import engine_of
from nagaya.engines.base import Booted, BootRequest, Incoming
from nagaya.errors import Conflict, ExecError, HostError, LaunchError, NagayaError
from nagaya.kernel import unix
from nagaya.model.spec import MachineSpec
from nagaya.model.state import ALIVE, EXITED, PAUSED, RESTARTING, RUNNING, STARTING, is_unborn
from nagaya.protocol import control
from nagaya.storage import events, machines, rootfs
from nagaya.storage.lock import FileLock
from nagaya.storage.logs import LogWriter
from nagaya.storage.paths import Paths, make_directory
from nagaya.supervisor import requests
from nagaya.supervisor.client import Client
from nagaya.supervisor.etc import write_etc
from nagaya.supervisor.loop import Loop, Timer
from nagaya.supervisor.network import wire_up
from nagaya.supervisor.planning import plan_boot
from nagaya.supervisor.programs import Program, Programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.arriving import Arriving
    from nagaya.supervisor.console import Console
    from nagaya.supervisor.filling import Filling
    from nagaya.supervisor.installing import Installing
    from nagaya.supervisor.leaving import Leaving
    from nagaya.supervisor.published import Published
    from nagaya.supervisor.resuming import SavedPrograms
    from nagaya.supervisor.saving import Saving

KILLED = 128 + 9
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 60.0
STABLE_AFTER_S = 10.0
PRESS_AGAIN_S = 3.0


class Supervisor:
    """`serve` returns when the machine has ended for good.

    The caller holds the liveness lock and, until the start is recorded, the command lock; both are released here.
    """

    def __init__(
        self, paths: Paths, spec: MachineSpec, launcher_fd: int, *, lock: FileLock, command: FileLock, attach: bool,
        size: tuple[int, int], saved: str = "",
    ) -> None:  # fmt: skip
        """`saved` is a snapshot's directory whose memory the first run goes on from; "" = boot."""
        self.paths = paths
        self.spec = spec
        self._lock = lock
        self._command = command
        self.loop = Loop()
        self.engine = engine_of(spec)
        self.state = machines.load_state(paths, spec.id)
        self.booted: Booted | None = None
        self.programs: Programs | Console | None = None
        self.main: Program | None = None
        self.filling: Filling | None = None
        self.saving: Saving | Leaving | None = None
        self.discards = spec.auto_remove  # whether nothing of the machine stays when it has ended
        self.installing: Installing | None = None
        self.keep = False  # a machine that was created with --rm stays, for who ends it to go on with it
        self._saved = saved
        self._helpers: list[int] = []  # pidfds
        self.published: Published | None = None  # its ports
        self.waiters: list[Client] = []  # clients that are answered when the machine has ended for good
        self._directory = paths.machine(spec.id)
        self._clients: set[Client] = set()
        self._attach = attach
        self._size = size
        self.log = LogWriter(self._directory, spec.log)
        self._stack = ExitStack()
        self._exit_status: int | None = None
        self._problem: NagayaError | None = None
        self._backoff_s = BACKOFF_FIRST_S
        self._timers: dict[str, Timer] = {}
        self._listener = -1
        self._over = False
        self._launcher: Client | None = self._accept(launcher_fd)

    def serve(self) -> None:
        make_directory(self.paths.runtime(self.spec.id))
        self._listener = unix.listen(self.paths.runtime(self.spec.id), "control.sock")
        self.loop.watch(self._listener, self._connected)
        self.start()
        self.loop.run()

    def watch_signals(self) -> None:
        """SIGTERM (a host that shuts down) stops the machine in good order."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # without a handler there is no wake-up byte

        def woken(events_: int) -> None:
            if signal.SIGTERM in os.read(read, 64) and self.state.phase in ALIVE:
                self.request_stop(self.spec.stop_timeout_s)

        self.loop.watch(read, woken)

    # -- the machine's runs

    def start(self) -> None:
        """Boot and ask the agent for the main program. What fails here ends the machine."""
        self._exit_status, self._problem = None, None
        self.set_state(
            phase=STARTING, error="", exit_code=-1, warnings=(), pid=0, stop_requested=False, oom_killed=False
        )
        self._command.release()  # whoever gets it now finds a machine that starts, and this lock held
        saved, self._saved = self._saved, ""
        arriving = self._find_arriving(saved)
        try:
            programs = self._load_programs("" if arriving else saved)
            booted = self._boot(saved) if arriving is None else arriving.boot(self._boot)
        except NagayaError as problem:
            self._start_failed(problem)
            return
        except OSError as error:
            self._start_failed(HostError.from_os(error, "cannot start the machine"))
            return
        self.booted = booted
        self.loop.watch(booted.pidfd, self._ended)
        for fd, call in booted.watch:
            self.loop.watch(fd, lambda events_, call=call: call())  # type: ignore[misc]
        self._watch_helpers(booted.helpers)
        self.programs = self._connect(booted)
        if programs is not None:
            self._resume(booted, saved, programs)
            return
        if arriving is not None:
            arriving.begin()
            return
        if booted.setup:
            self.programs.on_set_up = self._set_up
            self.programs.setup(booted.setup, sent=booted.told)
        self.set_timer("boot", booted.start_timeout_s, self._boot_timed_out)
        if booted.copies:
            self._fill(booted)
        else:
            self._spawn_main()

    def _load_programs(self, saved: str) -> SavedPrograms | None:
        if not saved or self.engine.rootfs_kind == "hardware":
            return None
        from nagaya.supervisor import resuming  # lazy: only who goes on from a snapshot

        return resuming.load(f"{saved}/programs.json")

    def _find_arriving(self, saved: str) -> Arriving | None:
        if not saved.endswith("/incoming"):
            return None
        from nagaya.supervisor.arriving import Arriving  # lazy: migrations alone

        return Arriving(self, saved)

    def _resume(self, booted: Booted, saved: str, programs: SavedPrograms) -> None:
        """Go on with programs that run already: tell the agent who the machine is by now, and when."""
        from nagaya.supervisor import resuming  # lazy: as above

        assert isinstance(self.programs, Programs)
        self.set_timer("boot", booted.start_timeout_s, self._boot_timed_out)
        try:
            main = self.programs.resume(programs, log=self.log)
        except NagayaError as problem:
            self._problem, self._exit_status = problem, 125
            self.engine.kill()
            return
        self.adopt_main(main)
        if self._launcher is not None and self._attach:
            main.join(self._launcher, stdin=self.spec.process.stdin)

        def continued(warnings: tuple[str, ...]) -> None:
            self._set_up(warnings)
            self.started(0)

        self.programs.on_continued = continued
        self.programs.go_on(resuming.renew(booted.setup, saved, self._directory, self.spec.id))

    def adopt_main(self, main: Program) -> None:
        """The main program of a machine that runs already."""
        main.on_exited = self.main_exited
        self.main = main

    def fail_start(self, problem: NagayaError) -> None:
        """Why the machine, which is just ending, did not come to run."""
        self._problem, self._exit_status = self._problem or problem, 125

    def _connect(self, booted: Booted) -> Programs | Console:
        """To the agent, or where there is none to the console."""
        if booted.agent >= 0:
            return Programs(self.loop, booted.agent, on_lost=self._agent_lost)
        from nagaya.supervisor.console import Console  # lazy: whole machines alone

        hear = self.installing.hear if self.installing is not None else None
        return Console(self.loop, booted.console, press=self._press, on_lost=self._agent_lost, on_output=hear)

    def _press(self, number: int) -> None:
        """A signal to a whole machine: of its buttons it has the one for power."""
        from nagaya.supervisor.console import is_power_button

        if is_power_button(number):
            self.engine.power_down()  # type: ignore[attr-defined]
            if self.state.stop_requested:  # a system that has just begun to boot does not see it: press again
                self.set_timer("press", PRESS_AGAIN_S, lambda: self._press(number))

    def _watch_helpers(self, pids: tuple[int, ...]) -> None:
        for pid in pids:
            fd = os.pidfd_open(pid)  # our child, and not waited for: the pid is still its own
            self._helpers.append(fd)
            self.loop.watch(fd, lambda events_, fd=fd: self._helper_ended(fd))  # type: ignore[misc]

    def _helper_ended(self, fd: int) -> None:
        """Before the program runs, nobody would answer what the machine's setting up waits for; later on it goes on alone."""
        self.loop.forget(fd)
        if self.state.phase == STARTING:
            self._problem = self._problem or LaunchError(
                "a helper process of the machine ended before its program was started",
                hint="the machine's log on this host may say why; start it again",
            )
            self.engine.kill()

    def _fill(self, booted: Booted) -> None:
        """Copy the machine's volumes in, for as long as it takes while something moves; then start its program."""
        from nagaya.supervisor.filling import Filling  # lazy: only where volumes cannot be shared

        assert isinstance(self.programs, Programs)
        self.filling = Filling(
            self.loop, self.programs, booted.copies, on_done=self._filled, on_failed=self._filling_failed,
            on_progress=self._filling_goes_on,
        )  # fmt: skip
        try:
            self.filling.begin()
        except OSError as error:
            self._filling_failed(HostError.from_os(error, "cannot copy into the machine"))

    def _filling_goes_on(self, source: str, target: str, count: int, done: bool) -> None:
        assert self.booted is not None
        self.set_timer("boot", self.booted.start_timeout_s, self._boot_timed_out)
        if self._launcher is not None and not self._launcher.congested:
            self._launcher.send(control.progress(source=source, target=target, bytes=count, done=done))

    def _filled(self) -> None:
        assert self.filling is not None
        self._set_up(tuple(self.filling.warnings))
        self._spawn_main()

    def _filling_failed(self, problem: NagayaError) -> None:
        self._problem, self._exit_status = self._problem or problem, 125
        self.engine.kill()

    def _spawn_main(self) -> None:
        booted = self.booted
        assert booted is not None and self.programs is not None
        process = self.spec.process
        if process.tty and self._size != (0, 0):
            process = process._replace(rows=self._size[0], columns=self._size[1])
        try:
            main = self.programs.spawn(process, booted.policy, main=True, log=self.log)
        except NagayaError as problem:  # a command line or an environment that fits no frame
            self._problem, self._exit_status = problem, 125
            self.engine.kill()
            return
        main.on_started, main.on_failed, main.on_exited = self.started, self._spawn_failed, self.main_exited
        if self.main is not None:
            main.succeed(self.main)
        if self._launcher is not None and self._attach:
            main.join(self._launcher, stdin=process.stdin)
        self.main = main
        self.programs.flush()

    def _boot(self, saved: str, incoming: Incoming | None = None) -> Booted:
        stack = self._stack = ExitStack()
        try:
            network = wire_up(self, stack)
            spec, plan = plan_boot(self, network)
            request = BootRequest(
                spec=spec, rootfs=plan, mounts=rootfs.plan_mounts(self.paths, self.spec),
                network=network, etc=write_etc(f"{self._directory}/etc", self.spec, network),
                runtime_dir=self.paths.runtime(self.spec.id), saved=f"{saved}/memory" if saved else "", incoming=incoming,
            )  # fmt: skip
            self.state = self.state._replace(address=network.address, ports=network.ports)
            booted = self.engine.boot(request, stack)
            told = (*network.warnings, *booted.warnings, *(self.installing.told() if self.installing else ()))
            return booted._replace(warnings=told)
        except BaseException:
            stack.close()
            raise

    def _start_failed(self, problem: NagayaError) -> None:
        self._problem = problem
        self._finish(problem.status if isinstance(problem, ExecError) else 125)

    def _set_up(self, warnings: tuple[str, ...]) -> None:
        assert self.booted is not None
        self.booted = self.booted._replace(warnings=(*self.booted.warnings, *warnings))

    def started(self, pid: int) -> None:
        assert self.booted is not None
        self.cancel_timer("boot")
        self.set_state(
            phase=RUNNING, started_ns=time.time_ns(), pid=self.booted.pid, warnings=self.booted.warnings,
            origin=self.booted.origin, finished_ns=0,
        )  # fmt: skip
        if self.published is not None:
            self.published.lead()
        self.record("start")
        self.set_timer("stable", STABLE_AFTER_S, self._became_stable)
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            answer = control.reply(warnings=list(self.booted.warnings))
            if self._attach:
                launcher.send(answer)
            else:
                launcher.finish(answer)

    def _became_stable(self) -> None:
        self._backoff_s = BACKOFF_FIRST_S

    def _spawn_failed(self, problem: NagayaError) -> None:
        self._problem = problem
        self.main_exited(problem.status if isinstance(problem, ExecError) else 125)

    def main_exited(self, status: int) -> None:
        self._exit_status = status
        if self.booted is not None and self.programs is not None:
            if self.booted.setup and self.spec.auto_remove and not any(mount.source for mount in self.spec.mounts):
                self.engine.kill()  # nobody will ever read what its kernel has not written yet
                return
            self.programs.shutdown()
            self.set_timer("shutdown", self.booted.end_timeout_s, self.engine.kill)

    def _boot_timed_out(self) -> None:
        assert self.booted is not None
        self._problem = LaunchError(
            f"the machine's agent did not start its program within {self.booted.start_timeout_s:.0f} s"
        )
        self.engine.kill()

    def _agent_lost(self, problem: NagayaError | None) -> None:
        """The stream to the agent ended: as part of the end (then the pidfd tells), or instead of it."""
        self._problem = self._problem or problem
        if self.booted is not None and self.booted.agent >= 0:
            self.engine.kill()

    def _ended(self, events_: int) -> None:
        """The machine's init is gone, and with it every process of the machine."""
        booted, programs = self.booted, self.programs
        assert booted is not None and programs is not None
        for fd in (booted.pidfd, *self._helpers, *(fd for fd, _ in booted.watch)):
            self.loop.forget(fd)
        for fd in self._helpers:
            os.close(fd)
        self._helpers = []
        self.booted = None
        if self.published is not None:
            self.published.cut_off()
        if self.filling is not None:
            self.filling.abandon()
            self.filling = None
        if self.saving is not None:
            self.saving.stopped()
        programs.close()
        self.programs = None
        for program in programs.running():
            if program is not self.main:
                program.on_exited(KILLED)
        ended = None
        try:
            ended = os.waitid(os.P_PIDFD, booted.pidfd, os.WEXITED)
        except ChildProcessError:
            pass  # not our child: whoever is its parent reaps it
        os.close(booted.pidfd)
        for name in list(self._timers):
            self.cancel_timer(name)
        status = self._exit_status
        if booted.agent < 0 and status is None and ended is not None and ended.si_code == os.CLD_EXITED:
            status = ended.si_status  # the system has switched its machine off, or we have
            self._problem = self._problem or (self._explain(ended) if status else None)
        host_oom = "oom" in self.engine.capabilities and self.engine.oom_killed()  # type: ignore[attr-defined]
        oom = programs.out_of_memory or host_oom
        if status is None:
            status = KILLED
            if self._problem is None and not self.state.stop_requested:
                self._problem = self._explain(ended) or LaunchError(
                    "the machine took more of this host's memory than it may have, and the kernel killed it"
                    if host_oom
                    else "the machine's init was killed from outside"
                )
        try:
            self._stack.close()
        except NagayaError as problem:  # something of it stays on the host: its status is told all the same
            self._problem = self._problem or problem
        except OSError as error:
            self._problem = self._problem or HostError.from_os(error, "cannot clean up after the machine")
        self.state = self.state._replace(oom_killed=oom)
        if self.installing is not None:
            status = self.installing.end(ended, status)
        if self.installing is not None and not self.state.installing and not self.state.stop_requested:
            self.start()  # what has been installed
        elif self._launcher is None and self._should_restart(status):
            self._restart_later(status)
        else:
            self._finish(status)

    def _explain(self, ended: os.waitid_result | None) -> NagayaError | None:
        if "explain" not in self.engine.capabilities:
            return None
        problem: NagayaError | None = self.engine.explain_end(ended)  # type: ignore[attr-defined]
        return problem

    def _should_restart(self, status: int) -> bool:
        policy = self.spec.restart
        if self.state.stop_requested or self.state.installing or policy.policy == "no":
            return False
        if policy.policy == "on-failure":
            return status != 0 and not (policy.max_retries and self.state.restarts >= policy.max_retries)
        return True

    def _restart_later(self, status: int) -> None:
        self.record("die", exit_code=str(status))
        self.set_state(
            phase=RESTARTING, exit_code=status, finished_ns=time.time_ns(), restarts=self.state.restarts + 1, pid=0
        )
        self.set_timer("restart", self._backoff_s, self.start)
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)

    def _finish(self, status: int) -> None:
        """The last run is over and everything on the host is freed: say so to all who wait, in that order."""
        problem = self._problem
        self.set_state(
            phase=EXITED, exit_code=status, error=problem.message if problem else "", finished_ns=time.time_ns(), pid=0,
            address="",
        )  # fmt: skip
        self.record("die", exit_code=str(status))
        self.log.close()
        if self._listener >= 0:
            self.loop.forget(self._listener)
            os.close(self._listener)
            self._listener = -1
        if (self.discards and not self.keep) or is_unborn(self.state):
            rootfs.remove_anonymous_volumes(self.paths, self.spec)  # first: with the record goes the knowledge of them
            machines.discard(self.paths, self.spec.id, self.spec.name)
            self.record("destroy")
        else:
            machines.remove_runtime(self.paths, self.spec.id)
        if self.published is not None:
            self.published.release()
        # Before anybody is told: who hears that it has ended may start it again at once.
        self._lock.release()
        # Stay until slow readers have read (their program's output is in our queues), but no longer as the machine.
        self._over = True
        requests.tell_end(self, list(self._clients), status, problem)
        if not self._clients:
            self.loop.stop()

    def abandon(self, error: Exception) -> None:
        """End the machine without a word in the store, which may be what failed: the next command mends what is left."""
        self.engine.kill()
        launcher = self.take_launcher()
        if launcher is None:
            return
        if isinstance(error, OSError):
            error = HostError.from_os(error, "cannot supervise the machine")
        broke = LaunchError(f"the machine's supervisor broke ({type(error).__name__})")
        launcher.fail(error if isinstance(error, NagayaError) else broke)

    # -- clients

    def _connected(self, events_: int) -> None:
        try:
            fd = unix.accept(self._listener)
        except OSError:
            return  # the client changed its mind, or we are out of descriptors: it will see the connection refused
        self._accept(fd)

    def _accept(self, fd: int) -> Client:
        client = Client(self.loop, fd, on_request=self._requested, on_gone=self._gone)
        self._clients.add(client)
        return client

    def _requested(self, client: Client, request: dict[str, object]) -> None:
        try:
            requests.handle(self, client, request)
        except NagayaError as problem:
            client.fail(problem)
        except OSError as error:
            client.fail(HostError.from_os(error, f"cannot {requests.describe(request)}"))

    def _gone(self, client: Client) -> None:
        self._clients.discard(client)
        if self.saving is not None and client is self.saving.client:
            self.saving.abandon()
        if client in self.waiters:
            self.waiters.remove(client)
        if client is self._launcher:
            self._launcher = None
        if self._over and not self._clients:
            self.loop.stop()

    def take_launcher(self) -> Client | None:
        launcher, self._launcher = self._launcher, None
        return launcher

    # -- what requests.py does to the machine

    def request_stop(self, timeout_s: float) -> None:
        """Ask the program to end, and kill the machine when it has not within `timeout_s`."""
        self.state = self.state._replace(stop_requested=True)
        if self.state.phase == RESTARTING:
            self.cancel_timer("restart")
            self._finish(self.state.exit_code)
            return
        if self.saving is not None:
            self.saving.stopped()
        self.resume()
        if self.installing is not None:
            timeout_s = 0  # an installer knows no power button, and the next one begins anew
        self.set_timer("stop", timeout_s, self._end_now)
        if self.main is not None and self.booted is not None:
            self.main.signal(self.spec.stop_signal)

    def request_kill(self) -> None:
        self.state = self.state._replace(stop_requested=True)
        if self.state.phase == RESTARTING:
            self.cancel_timer("restart")
            self._finish(self.state.exit_code)
            return
        if self.saving is not None:
            self.saving.stopped()
        self.resume()
        self._end_now()

    def _end_now(self) -> None:
        """End every program at once. What they have written stays written, whatever the walls are.

        A kernel of the machine's own has to write it out first: pulling the plug would lose what is in its memory.
        """
        if self.booted is not None and self.booted.agent < 0:
            self._exit_status = KILLED
            self.engine.quit()  # type: ignore[attr-defined]
            self.set_timer("shutdown", self.booted.end_timeout_s, self.engine.kill)
            return
        if self.booted is None or self.programs is None or not self.booted.setup or self.state.phase == STARTING:
            self.engine.kill()
            return
        self.programs.shutdown()
        self.set_timer("shutdown", self.booted.end_timeout_s, self.engine.kill)

    def pause(self) -> None:
        self.refuse_while_saving()
        self.engine.pause()  # type: ignore[attr-defined]
        self.set_state(phase=PAUSED)
        self.record("pause")

    def refuse_while_saving(self) -> None:
        """Raise `Conflict` while a snapshot is being taken, or the machine is on its way to another host."""
        if self.saving is not None:
            raise Conflict(f"machine '{self.spec.name}' {self.saving.what}", hint="try again in a moment")

    def resume(self) -> None:
        if self.state.phase == PAUSED:
            self.engine.resume()  # type: ignore[attr-defined]
            if self.programs is not None and self.booted is not None and self.booted.setup:
                self.programs.set_clock(time.time_ns())  # it stood still with the machine
            self.set_state(phase=RUNNING)
            self.record("unpause")

    # -- records

    def set_state(self, **changes: object) -> None:
        self.state = self.state._replace(**changes)  # type: ignore[arg-type]
        machines.store_state(self.paths, self.spec.id, self.state)

    def record(self, action: str, **attributes: str) -> None:
        events.record(
            self.paths.events, "machine", action, self.spec.id, self.spec.name, image=self.spec.image, **attributes
        )

    def set_timer(self, name: str, seconds: float, call: object) -> None:
        self.cancel_timer(name)
        self._timers[name] = self.loop.after(seconds, call)  # type: ignore[arg-type]

    def cancel_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
