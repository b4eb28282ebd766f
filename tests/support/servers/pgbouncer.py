"""A private PgBouncer in front of a PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import signal

from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.server import HOST, MissingServer, Server, unprivileged


class PgBouncer(Server):
    """A PgBouncer in front of a PostgreSQL. All clients of a database share two connections to it.

    `mode` is PgBouncer's `pool_mode`. `ignores` lists startup parameters that PgBouncer ignores; it rejects clients
    that send any other unsupported parameter.
    """

    label = "pgbouncer"
    stop_signal = signal.SIGTERM  # makes PgBouncer shut down immediately, whatever its clients do

    def __init__(self, postgres: PostgresServer, *, mode: str = "transaction", ignores: str = "") -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
        if program is None:
            raise MissingServer("pgbouncer was not found in PATH or /usr/sbin")
        self._program = program
        self._settings = {
            "listen_addr": HOST,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": mode,
            "default_pool_size": "2",
            "max_client_conn": "200",
            "ignore_startup_parameters": ignores,
        }
        self._server = f"host={HOST} port={postgres.port} user=postgres"
        super().__init__(unprivileged() if os.geteuid() == 0 else None)  # PgBouncer refuses to run as root

    def url_of(self, database_url: str) -> str:
        """Return the URL of the same database through this PgBouncer."""
        return f"postgresql://postgres@{HOST}:{self.port}/{database_url.rpartition('/')[2]}"

    def _prepare(self) -> None:
        """Do nothing: the settings file contains the port, so `_command` writes the file."""

    def _command(self, port: int) -> list[str]:
        settings = self._settings | {"listen_port": str(port)}
        lines = ["[databases]", f"* = {self._server}", "[pgbouncer]", *(f"{k} = {v}" for k, v in settings.items())]
        (self._base / "pgbouncer.ini").write_text("\n".join([*lines, ""]))
        return [self._program, str(self._base / "pgbouncer.ini")]

    def _ready(self, port: int, pid: int) -> bool:
        # If another process had taken the port, PgBouncer would end.
        return f"listening on {HOST}:{port}" in self.log

    def _discard(self) -> None:
        """Do nothing, because PgBouncer leaves nothing to release."""
