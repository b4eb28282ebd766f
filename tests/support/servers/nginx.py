"""A private nginx as a reverse proxy."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from tests.support.servers.server import HOST, MissingServer, Server


class NginxServer(Server):
    """An nginx that serves another server of this machine under a path.

    With `strips`, nginx removes the path from the requests that it passes on.
    """

    label = "nginx"
    stop_signal = signal.SIGTERM

    def __init__(self, upstream_port: int, path: str, *, strips: bool) -> None:
        self._program = _find_nginx()
        super().__init__()
        self._upstream = f"http://{HOST}:{upstream_port}{'/' if strips else ''}"
        self._path = path
        self._config = self._base / "nginx.conf"
        self._pid_path = self._base / "nginx.pid"

    @property
    def url(self) -> str:
        """The URL of the path, without a trailing slash."""
        return f"http://{HOST}:{self.port}{self._path}"

    def _prepare(self) -> None:
        self._pid_path.unlink(missing_ok=True)

    def _command(self, port: int) -> list[str]:
        folders = "".join(
            f"    {kind}_temp_path {self._base}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # The `location` block is the one in docs/operations.md.
        self._config.write_text(f"""
daemon off;
master_process off;
pid {self._pid_path};
error_log stderr;
events {{}}
http {{
    access_log off;
{folders}
    map $http_upgrade $connection_upgrade {{
        default upgrade;
        '' '';
    }}
    server {{
        listen {HOST}:{port};
        location {self._path}/ {{
            proxy_pass {self._upstream};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 90s;
            proxy_buffering off;
            client_max_body_size 11m;
        }}
    }}
}}
""")
        return [str(self._program), "-e", "stderr", "-p", str(self._base), "-c", str(self._config)]

    def _discard(self) -> None:
        """Do nothing, because nginx leaves nothing to release."""

    def _ready(self, port: int, pid: int) -> bool:
        # nginx writes its pid file once the port is open.
        try:
            return self._pid_path.read_text().strip() == str(pid)
        except OSError:
            return False


def _find_nginx() -> Path:
    if found := shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))):
        return Path(found)
    raise MissingServer("nginx was not found in PATH or /usr/sbin")
