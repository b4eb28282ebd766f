"""Fork the services of tests from a process that has already imported the product.

Starting Python and importing the product take most of the time that a service needs to start, and do the same work each
time. Importing the product opens and starts nothing, so a fork is in the state of `python main.py` after its imports.
The nursery forks twice, and the intermediate process ends: each service thus becomes a child of the test process, which
can wait for it as for any other child.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import reaper

ROOT = Path(__file__).resolve().parent.parent.parent
PR_SET_CHILD_SUBREAPER = 36
MAX_REQUEST_BYTES = 256 * 1024
POLL_SECONDS = 0.005


class Process:
    """A forked service, with the part of the interface of `subprocess.Popen` that tests need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        # Several threads may wait for the process, but the kernel tells only one of them how the process ended.
        self._lock = threading.RLock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + timeout if timeout is not None else None
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                assert timeout is not None
                raise subprocess.TimeoutExpired("main.py", timeout)
            time.sleep(POLL_SECONDS)
        return status

    def send_signal(self, number: int) -> None:
        with self._lock:  # no other thread can reap the process first, so its pid is not reused
            if self.poll() is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """A process that has imported the application and forks services. Each test process starts one on first use."""

    def __init__(self) -> None:
        reaper.start()  # call this first, because it sets an environment variable that the services inherit
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nursery", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=ROOT,
        )
        theirs.close()
        atexit.register(self._end)

    def _end(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, environment: Mapping[str, str], folder: Path, log: Path) -> Process:
        """Start the equivalent of `python main.py` with this environment, in this folder and in a new session."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        request = {"environment": dict(environment), "folder": str(folder), "log": str(log), "files": files}
        encoded = json.dumps(request).encode()
        assert len(encoded) <= MAX_REQUEST_BYTES
        # Adopt orphans only during this call: those that services leave later must not become our children.
        _adopt(1)
        try:
            self._socket.sendall(encoded)
            return Process(int(self._socket.recv(64)))
        finally:
            _adopt(0)


def _adopt(whether: int) -> None:
    """Set whether orphaned descendants become children of this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, whether, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


_nursery: Nursery | None = None


def start(environment: Mapping[str, str], folder: Path, log: Path) -> Process:
    global _nursery
    if _nursery is None:
        _nursery = Nursery()
    return _nursery.start(environment, folder, log)


# --- in the nursery's process


def tend(requests: socket.socket) -> None:
    import main  # these imports are the purpose of this process

    while encoded := requests.recv(MAX_REQUEST_BYTES):
        reading, writing = os.pipe()
        middle = os.fork()
        if middle:
            # Once the intermediate process has ended, the service is a child of the test process.
            os.close(writing)
            os.waitpid(middle, 0)
            requests.send(os.read(reading, 64))
            os.close(reading)
            continue
        service = os.fork()
        if service:
            os.write(writing, str(service).encode())
            os._exit(0)
        for each in (reading, writing):
            os.close(each)
        requests.close()
        os._exit(serve(main, json.loads(encoded)))


def serve(main: Any, request: Mapping[str, Any]) -> int:
    os.setsid()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (request["files"], most))
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [str(ROOT / "main.py")]
    status = 1
    try:
        status = main.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except Exception as error:  # noqa: BLE001 (report any exception as the interpreter would)
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    tend(socket.socket(fileno=int(sys.argv[1])))
