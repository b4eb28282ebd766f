"""Several worker processes on one address: started, monitored, replaced one by one, and stopped together.

Rules:
- The supervisor serves no requests, and it never waits for a worker: in each round, it checks all workers and takes
  the next step of a rolling restart.
- TERM or INT stops the workers; a second signal, or QUIT, skips the waiting. HUP replaces all workers; each of
  them stops only after its replacement serves.
- A worker that dies is started again. If it died soon after its start, the supervisor pauses first, longer each
  time. If no worker has ever served, the supervisor stops instead of starting another one.
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

# A worker that answers no ping for this long is killed.
SILENT_SECONDS = 30.0
# A replacement must serve within this time.
START_SECONDS = 60.0
# The first pause before a worker that died soon after its start is restarted. The pause doubles with each such death.
RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 10.0
# A worker that lived for less than this died soon after its start.
STEADY_SECONDS = 5.0
KILL_AFTER_SECONDS = STOP_SECONDS + 2.0
SKIP_WAITING_SECONDS = 2.0

log = structlog.get_logger("workers")


class WorkerServer(Server):
    """The server of a worker. It ignores repeated TERM signals, which may be sent to the whole process group."""

    def __init__(self, config: uvicorn.Config, drain_seconds: float, supervisor: int) -> None:
        super().__init__(config, drain_seconds)
        self._supervisor = supervisor

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        signal.signal(signal.SIGQUIT, self._skip_waiting)
        signal.signal(signal.SIGUSR1, self._stop_without_drain)
        super().run(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True

    def _skip_waiting(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.force_exit = True

    def _stop_without_drain(self, sig: int, frame: FrameType | None) -> None:
        """Stop without draining: a replacement serves at the same address, so load balancers need not be told."""
        self._drain_seconds = 0.0
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if os.getppid() != self._supervisor and not self.should_exit:
            log.warning("supervisor lost; stopping")
            self.should_exit = True
        return await super().on_tick(counter)


class Worker(Process):
    """A worker as its supervisor sees it. The object is pickled for the worker, so it has only plain attributes."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds
        # The supervisor's process id is read now, because the supervisor may be gone before the worker has started.
        self._supervisor = os.getpid()
        self._awaits_answer = False
        self.has_served = False
        self.since = self.heard_at = time.monotonic()
        self.died_at: float | None = None
        self.pause = 0.0  # seconds between this worker's death and the start of its successor
        super().__init__(config, [listener])

    # --- in the worker

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        # `super().target` starts a thread that answers the supervisor and uses `_server`, so set `_server` first.
        self._server = WorkerServer(self.config, self._drain_seconds, self._supervisor)
        super().target(sockets)

    # --- in the supervisor

    def check(self) -> None:
        """Ping the worker, or read its answer to the last ping."""
        try:
            if not self._awaits_answer:
                self.parent_conn.send(b"ping")
                self._awaits_answer = True
            elif self.parent_conn.poll():
                if self.parent_conn.recv() and not self.has_served:
                    self.has_served = True
                    log.info("worker ready", worker=self.pid)
                self.heard_at = time.monotonic()
                self._awaits_answer = False
        except (OSError, EOFError):
            pass  # the worker is dying, and `is_running` will soon be false

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def died(self, now: float) -> None:
        """Record the death, and set `pause`, the delay before the start of the successor.

        Before this call, `pause` is the delay that preceded the start of this worker.
        """
        is_steady = self.has_served and now - self.since >= STEADY_SECONDS
        self.pause = 0.0 if is_steady else min(max(RETRY_SECONDS, 2 * self.pause), MAX_RETRY_SECONDS)
        self.died_at = now

    def send_signal(self, number: signal.Signals) -> None:
        if self.process.pid is not None and self.is_running:
            os.kill(self.process.pid, number)


class Supervisor:
    """The supervisor of all workers. `app` is the import path of the application, such as `main:worker`."""

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
        """Run until a signal stops the service, or no worker can start. Return the exit status.

        `announce` is called as soon as signals are handled.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        announce()
        with tempfile.TemporaryDirectory(prefix="marquee-metrics-", ignore_cleanup_errors=True) as self._folder:
            os.environ[metrics.FOLDER_VARIABLE] = self._folder
            self._workers = [self._start() for _ in range(self._number)]
            while not self._stop_signals:
                time.sleep(TICK_SECONDS)
                self._check_workers()
                self._continue_restart()
            self._stop()
        return self._status

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._wants_restart = True
        else:
            self._stop_signals += 2 if number == signal.SIGQUIT else 1

    def _start(self) -> Worker:
        worker = Worker(self._config, self._listener, self._drain_seconds)
        # Ctrl-C reaches the whole process group, but only the supervisor may act on it. A worker inherits this signal
        # mask, so it ignores Ctrl-C from its start.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            worker.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        log.info("worker started", worker=worker.pid)
        return worker

    def _reap(self, worker: Worker) -> None:
        worker.kill()
        worker.join()
        if worker.pid is not None:
            metrics.forget_worker(worker.pid, self._folder)

    def _check_workers(self) -> None:
        now = time.monotonic()
        for index, worker in enumerate(self._workers):
            if worker.died_at is None:
                worker.check()
                self._has_served = self._has_served or worker.has_served
                hangs = now - worker.heard_at > SILENT_SECONDS
                if worker.is_running and not hangs:
                    continue
                self._reap(worker)
                worker.died(now)
                if (worker.exitcode or 0) > 0 and not self._has_served:
                    # No worker has ever served, so the application or its environment is broken: do not retry.
                    log.error("worker start failed; stopping", worker=worker.pid)
                    self._status = STARTUP_FAILURE
                    self._stop_signals += 1
                    return
                log.warning("worker died; starting another", worker=worker.pid, status=worker.exitcode, hung=hangs)
            if worker.died_at is not None and now >= worker.died_at + worker.pause:
                self._workers[index] = self._start()
                self._workers[index].pause = worker.pause

    def _continue_restart(self) -> None:
        """Take the next step of a rolling restart. The old worker is stopped only after its replacement serves, and the
        next replacement is started only after the old worker has exited.
        """
        now = time.monotonic()
        for worker in self._leaving[:]:
            if not worker.is_running or now - worker.since > KILL_AFTER_SECONDS:
                self._reap(worker)
                self._leaving.remove(worker)
        if self._leaving:
            return
        if self._wants_restart and not self._to_replace:
            self._wants_restart = False
            self._to_replace = self._workers[:]
            log.info("rolling restart started", workers=len(self._to_replace))
        if not self._to_replace:
            return
        old, new = self._to_replace[0], self._replacement
        if old not in self._workers:  # the old worker died and has already been replaced
            self._to_replace.pop(0)
            return
        if new is None:
            self._replacement = self._start()
            return
        new.check()
        if new.has_served:
            self._replacement = None
            self._to_replace.pop(0)
            self._workers[self._workers.index(old)] = new
            self._retire(old, signal.SIGUSR1)
            log.info("worker replaced", worker=old.pid, by=new.pid)
        elif not new.is_running or now - new.since > START_SECONDS:
            self._reap(new)
            self._replacement = None
            self._to_replace.clear()
            log.error("replacement start failed; old workers kept", status=new.exitcode)

    def _retire(self, worker: Worker, number: signal.Signals) -> None:
        worker.since = time.monotonic()
        worker.send_signal(number)
        self._leaving.append(worker)

    def _stop(self) -> None:
        leaving = [*self._leaving, *self._workers, *([self._replacement] if self._replacement else [])]
        for worker in leaving:
            worker.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._drain_seconds + KILL_AFTER_SECONDS
        skips_waiting = False
        while any(worker.is_running for worker in leaving):
            if self._stop_signals > 1 and not skips_waiting:
                skips_waiting = True
                until = time.monotonic() + SKIP_WAITING_SECONDS
                for worker in leaving:
                    worker.send_signal(signal.SIGQUIT)
            if time.monotonic() > until:
                log.warning("shutdown deadline passed; workers killed")
                break
            time.sleep(TICK_SECONDS / 2)
        for worker in leaving:
            self._reap(worker)
