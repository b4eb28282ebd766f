"""Several processes on one address: started, looked after, replaced one by one, and stopped together.

The supervisor serves nothing itself. It never waits for a worker: each round it looks at all of them and takes the next
step. Signals: TERM or INT stops, again (or QUIT) at once; HUP replaces every worker, each only when its replacement
serves.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from types import FrameType

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Process

from core import metrics
from core.settings import Settings
from server.serving import STOP_SECONDS, TICK_SECONDS, Server, server_config

SILENT_SECONDS = 30.0  # a worker that does not answer for so long hangs
START_SECONDS = 60.0  # for a replacement
RETRY_SECONDS = 1.0  # before a worker that could not start, or died young, is started again; each time twice as long
MAX_RETRY_SECONDS = 10.0
STEADY_SECONDS = 5.0  # who has lived for so long did not die of its start
KILL_AFTER_SECONDS = STOP_SECONDS + 2.0
HURRY_SECONDS = 2.0

log = structlog.get_logger("workers")


class WorkerServer(Server):
    """Its supervisor decides: others may send TERM, too, to the whole group, so that a second one says nothing."""

    def __init__(self, config: uvicorn.Config, drain_seconds: float, supervisor: int) -> None:
        super().__init__(config, drain_seconds)
        self._supervisor = supervisor

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        signal.signal(signal.SIGQUIT, self._hurry)
        signal.signal(signal.SIGUSR1, self._make_way)
        super().run(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True

    def _hurry(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.force_exit = True

    def _make_way(self, sig: int, frame: FrameType | None) -> None:
        """For a replacement that serves at the same address: no load balancer need notice."""
        self._drain_seconds = 0.0
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if os.getppid() != self._supervisor and not self.should_exit:
            log.warning("the supervisor is gone: stopping")
            self.should_exit = True
        return await super().on_tick(counter)


class Worker(Process):
    """One process. Pickled on its way there: only plain attributes."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds
        self._supervisor = os.getpid()  # said here: while the worker starts, it may be gone already
        self._is_asked = False
        self.has_served = False
        self.since = self.heard_at = time.monotonic()
        self.died_at: float | None = None
        self.pause = 0.0  # after its death, before there is another in its place
        super().__init__(config, [listener])

    # --- in the process

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        # Before the thread that answers asks for it.
        self._server = WorkerServer(self.config, self._drain_seconds, self._supervisor)
        super().target(sockets)

    # --- in the supervisor

    def look(self) -> None:
        """Ask, or see whether there is an answer."""
        try:
            if not self._is_asked:
                self.parent_conn.send(b"ping")
                self._is_asked = True
            elif self.parent_conn.poll():
                if self.parent_conn.recv() and not self.has_served:
                    self.has_served = True
                    log.info("worker serves", worker=self.pid)
                self.heard_at = time.monotonic()
                self._is_asked = False
        except (OSError, EOFError):
            pass  # it dies, which is seen otherwise

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def died(self, now: float) -> None:
        """Its `pause` was that of the one before it."""
        is_steady = self.has_served and now - self.since >= STEADY_SECONDS
        self.pause = 0.0 if is_steady else min(max(RETRY_SECONDS, 2 * self.pause), MAX_RETRY_SECONDS)
        self.died_at = now

    def tell(self, number: signal.Signals) -> None:
        if self.process.pid is not None and self.is_running:
            os.kill(self.process.pid, number)


class Supervisor:
    """`app` is where the workers import the application from."""

    def __init__(self, settings: Settings, app: str, listener: socket.socket) -> None:
        self._config = server_config(settings, app)
        self._drain_seconds = settings.drain_seconds
        self._listener = listener
        self._number = settings.workers
        self._folder = ""
        self._workers: list[Worker] = []
        self._to_replace: list[Worker] = []
        self._replacement: Worker | None = None
        self._leaving: list[Worker] = []
        self._has_served = False
        self._wants_restart = False
        self._stop_signals = 0
        self._status = 0

    def run(self, announce: Callable[[], None]) -> int:
        """Until told to stop, or until it is clear that no worker can start. Answers the exit status.

        Whoever has read what `announce` says may tell it to stop.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, self._hear)
        announce()
        with tempfile.TemporaryDirectory(prefix="marquee-metrics-", ignore_cleanup_errors=True) as self._folder:
            os.environ[metrics.FOLDER_VARIABLE] = self._folder
            self._workers = [self._start() for _ in range(self._number)]
            while not self._stop_signals:
                time.sleep(TICK_SECONDS)
                self._look_after()
                self._go_on_replacing()
            self._stop()
        return self._status

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._wants_restart = True
        else:
            self._stop_signals += 2 if number == signal.SIGQUIT else 1

    def _start(self) -> Worker:
        worker = Worker(self._config, self._listener, self._drain_seconds)
        # A worker inherits the mask: Ctrl-C reaches the whole group, and only the supervisor shall act on it, from
        # the worker's first moment on.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            worker.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        log.info("worker started", worker=worker.pid)
        return worker

    def _bury(self, worker: Worker) -> None:
        worker.kill()
        worker.join()
        if worker.pid is not None:
            metrics.forget_worker(worker.pid, self._folder)

    def _look_after(self) -> None:
        now = time.monotonic()
        for index, worker in enumerate(self._workers):
            if worker.died_at is None:
                worker.look()
                self._has_served = self._has_served or worker.has_served
                hangs = now - worker.heard_at > SILENT_SECONDS
                if worker.is_running and not hangs:
                    continue
                self._bury(worker)
                worker.died(now)
                if (worker.exitcode or 0) > 0 and not self._has_served:
                    # Nobody has ever served: it is the application or its surroundings, and trying again is no use.
                    log.error("a worker could not start; stopping", worker=worker.pid)
                    self._status = STARTUP_FAILURE
                    self._stop_signals += 1
                    return
                log.warning("a worker died; starting another", worker=worker.pid, status=worker.exitcode, hung=hangs)
            if worker.died_at is not None and now >= worker.died_at + worker.pause:
                self._workers[index] = self._start()
                self._workers[index].pause = worker.pause

    def _go_on_replacing(self) -> None:
        """One step of a rolling restart: a replacement serves before the old worker is told to make way, and that one
        is gone before the next replacement is started.
        """
        now = time.monotonic()
        for worker in self._leaving[:]:
            if not worker.is_running or now - worker.since > KILL_AFTER_SECONDS:
                self._bury(worker)
                self._leaving.remove(worker)
        if self._leaving:
            return
        if self._wants_restart and not self._to_replace:
            self._wants_restart = False
            self._to_replace = self._workers[:]
            log.info("replacing the workers one by one", workers=len(self._to_replace))
        if not self._to_replace:
            return
        old, new = self._to_replace[0], self._replacement
        if old not in self._workers:  # it died, and was replaced then
            self._to_replace.pop(0)
            return
        if new is None:
            self._replacement = self._start()
            return
        new.look()
        if new.has_served:
            self._replacement = None
            self._to_replace.pop(0)
            self._workers[self._workers.index(old)] = new
            self._leave(old, signal.SIGUSR1)
            log.info("worker replaced", worker=old.pid, by=new.pid)
        elif not new.is_running or now - new.since > START_SECONDS:
            self._bury(new)
            self._replacement = None
            self._to_replace.clear()
            log.error("a replacement did not start; the workers that serve are kept", status=new.exitcode)

    def _leave(self, worker: Worker, number: signal.Signals) -> None:
        worker.since = time.monotonic()
        worker.tell(number)
        self._leaving.append(worker)

    def _stop(self) -> None:
        leaving = [*self._leaving, *self._workers, *([self._replacement] if self._replacement else [])]
        for worker in leaving:
            worker.tell(signal.SIGTERM)
        until = time.monotonic() + self._drain_seconds + KILL_AFTER_SECONDS
        is_hurrying = False
        while any(worker.is_running for worker in leaving):
            if self._stop_signals > 1 and not is_hurrying:
                is_hurrying = True
                until = time.monotonic() + HURRY_SECONDS
                for worker in leaving:
                    worker.tell(signal.SIGQUIT)
            if time.monotonic() > until:
                log.warning("killing the workers that have not stopped")
                break
            time.sleep(TICK_SECONDS / 2)
        for worker in leaving:
            self._bury(worker)
