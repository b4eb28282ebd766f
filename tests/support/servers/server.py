"""A private server process for the tests, which can be killed, frozen and restarted.

The tests kill, freeze and restart these servers, so they never use servers that already run on the machine: each object
owns its process, its port on 127.0.0.1 and its directory under /tmp. `close()` removes all three; otherwise they are
removed when the interpreter ends, however it ends. Every wait polls with a deadline. If a server does not start,
`ServerError` is raised with the end of its log; if its program is not installed, `MissingServer` is raised.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pwd
import select
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support import reaper
from tests.support.ports import free_port

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.02


class MissingServer(Exception):
    """The program of a server is not installed, or cannot be used on this machine."""


class ServerError(Exception):
    """A server did not start, stop or respond as expected."""


class Owner(NamedTuple):
    uid: int
    gid: int


class Server(ABC):
    """One server process (and its children) that can be killed, frozen and started again on the same port."""

    label: str
    stop_signal: signal.Signals

    def __init__(self, owner: Owner | None = None) -> None:
        reaper.start()
        self._base = Path(tempfile.mkdtemp(prefix=reaper.folder_prefix(self.label), dir=reaper.TMP))
        self._owner = owner
        self._log = self._base / "server.log"
        self._log_start = 0
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._alive_fd = -1
        self._frozen = False
        self._closed = False
        self._creator = os.getpid()
        atexit.register(self.close)
        if owner is not None:
            os.chown(self._base, owner.uid, owner.gid)

    @abstractmethod
    def _command(self, port: int) -> list[str]: ...

    @abstractmethod
    def _ready(self, port: int, pid: int) -> bool:
        """Return whether the process `pid`, rather than another one on the same port, accepts clients."""

    @abstractmethod
    def _prepare(self) -> None:
        """Prepare the next start."""

    @abstractmethod
    def _discard(self) -> None:
        """Release what the ended processes left outside the directory. Then close() removes the directory."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError(f"{self.label} has not been started yet")
        return self._port

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.label} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """The log that the server has written since its last start."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._log_start)
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def start(self) -> None:
        """Start the server unless it is already running; return once it accepts clients."""
        if self._closed:
            raise RuntimeError(f"{self.label} is closed")
        if self.running:
            return
        self._wait_gone()
        self._prepare()
        deadline = time.monotonic() + START_SECONDS
        while True:
            # Until the first successful start, the port may change; afterwards clients know the port, so it is kept.
            port = free_port() if self._port is None else self._port
            self._launch(port)
            try:
                came_up = self._wait_ready(port, deadline)
            except BaseException:
                self.kill()
                raise
            if came_up:
                self._port = port
                return
            self._wait_gone()
            if "address already in use" not in self.log.lower() or time.monotonic() > deadline:
                raise ServerError(f"{self.label} did not start:\n{self.log[-4000:]}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Stop the server cleanly; do nothing if it is not running."""
        if self._process is None:
            return
        if self._frozen:
            self.thaw()
        self._process.send_signal(self.stop_signal)
        self._wait_gone()

    def kill(self) -> None:
        """Kill the server and all its children with SIGKILL; return once all have ended."""
        if self._process is None:
            return
        # While stopped, the server can neither start another child nor free the pid of a child about to be signalled.
        self._halt()
        self._signal_all(signal.SIGKILL)
        self._wait_gone()

    def restart(self) -> None:
        """Stop the server cleanly, and start it again on the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop the server with SIGSTOP: the kernel keeps connections and accepts new ones, but no process responds."""
        self._halt()
        if not self._frozen:
            raise ServerError(f"{self.label} cannot be frozen: it is not running\n{self.log[-4000:]}")

    def thaw(self) -> None:
        """Undo freeze(); do nothing if the server is not frozen."""
        if self._frozen:
            self._signal_all(signal.SIGCONT)
            self._frozen = False

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Kill the server, and start it again after the block."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze the server for the duration of the block."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def close(self) -> None:
        """End the server and remove its directory; it cannot be started again. A second call does nothing."""
        # A forked child inherits the atexit hook, but must not end the server.
        if self._closed or os.getpid() != self._creator:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            with contextlib.suppress(ServerError):
                self.stop()
        finally:
            try:
                self.kill()
                self._discard()
            finally:
                shutil.rmtree(self._base, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        # PGDATA, PGPORT and the like would mislead the programs. LC_ALL makes messages English, as start() expects.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return env | {"LC_ALL": "C", "HOME": str(self._base)}

    def _launch(self, port: int) -> None:
        # All descendants inherit the pipe's write end, so end of file at its read end means that all have ended.
        # Checking pids would not do, because orphans may stay zombies forever if pid 1 reaps nothing.
        self._alive_fd, inherited = os.pipe()
        try:
            with self._log.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    self._command(port),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._base,
                    env=self._environment(),
                    pass_fds=(inherited,),
                    start_new_session=True,  # Ctrl-C must not end the server while tests use it
                    user=None if self._owner is None else self._owner.uid,
                    group=None if self._owner is None else self._owner.gid,
                    extra_groups=None if self._owner is None else [],
                )
        except BaseException:
            os.close(self._alive_fd)
            self._alive_fd = -1
            raise
        finally:
            os.close(inherited)

    def _wait_ready(self, port: int, deadline: float) -> bool:
        """Return True once the server accepts clients, False if the process ended instead."""
        while self.running:
            if self._ready(port, self.pid):
                return True
            if time.monotonic() > deadline:
                raise ServerError(f"{self.label} was not ready in {START_SECONDS:.0f} s:\n{self.log[-4000:]}")
            time.sleep(POLL_SECONDS)
        return False

    def _wait_gone(self) -> None:
        if self._process is None:
            return
        deadline = time.monotonic() + STOP_SECONDS
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise ServerError(f"{self.label} did not end in {STOP_SECONDS:.0f} s:\n{self.log[-4000:]}") from None
        poller = select.poll()
        poller.register(self._alive_fd, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ServerError(f"{self.label} ended, but left children running")
        os.close(self._alive_fd)
        self._alive_fd = -1
        self._process = None
        self._frozen = False

    def _halt(self) -> None:
        """Stop all processes with SIGSTOP, and wait for the main one; set `_frozen` unless the server has ended."""
        process = self._process
        if process is None or self._frozen or process.poll() is not None:
            return
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            pid, status = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
            if pid and os.WIFSTOPPED(status):
                break
            if pid:
                # The process is reaped here, so Popen cannot read its status.
                process.returncode = os.waitstatus_to_exitcode(status)
                return
            if time.monotonic() > deadline:
                raise ServerError(f"{self.label} could not be stopped with SIGSTOP")
            time.sleep(0.001)
        self._frozen = True
        self._signal_all(signal.SIGSTOP)

    def _signal_all(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        # Signal the children first: while their parent is stopped, it reaps none, so no pid can be reused.
        for pid in [*_children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _children(pid: int) -> list[int]:
    found = []
    if Path("/proc/self/stat").exists():
        for entry in Path("/proc").glob("[0-9]*/stat"):
            # The second field is the program's name in brackets, which may itself contain brackets and spaces.
            with contextlib.suppress(OSError):
                if int(entry.read_text(errors="replace").rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.parent.name))
        return found
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        child, parent = line.split()
        if int(parent) == pid:
            found.append(int(child))
    return found


def unprivileged() -> Owner:
    """Return the user for a server that refuses to run as root. Raise MissingServer if there is none."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Owner(entry.pw_uid, entry.pw_gid)
    raise MissingServer("the server does not run as root, and there is no user named postgres or nobody to run it as")


def wheel_dir(package: str) -> Path | None:
    """Return the folder of an installed package that may hold programs, or None if the package is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
