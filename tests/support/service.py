"""The service under test as a real process on a real port, with people and watchers who use it.

Tests read as scenes: `async with service.person() as alice, service.watch() as watcher:`, then
`await watcher.expect("add", "movies")`. Nothing here sleeps for a fixed time: every wait is for a condition.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from jose import jwt
from websockets.asyncio.client import ClientConnection, connect

from tests.support import nursery
from tests.support.frames_checked import check_frame
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 30.0
PASSWORD = "sewers of Vienna"  # must differ from the example password, which the banner prints
SECRET = "a secret for tests only, long enough"
ADMIN = ("chief", "the chief of tests")

# What must never appear in a log: tokens, emailed URLs, hashes, and the passwords and keys of the tests.
SECRETS = re.compile(
    r"eyJ[A-Za-z0-9_-]{8,}|[?&]token=[^\s&\"']{8,}|\$argon2|Bearer [A-Za-z0-9._-]{8,}|"
    + "|".join(re.escape(secret) for secret in (PASSWORD, SECRET, ADMIN[1]))
)

# Loading the certificate authorities for each client takes longer than most tests, and nothing here uses HTTPS.
NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

Headers = Mapping[str, str] | Sequence[tuple[str, str]] | None

_names = itertools.count(1)


async def eventually(check: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """Wait until `check()` returns a true value, and return the value. `check` may be asynchronous."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"expected within {seconds} s: {what}")
        await asyncio.sleep(0.02)


class Service:
    """A process of `python main.py` with the given settings. `start` returns when the service is ready."""

    command: Sequence[str] = (str(ROOT / "main.py"),)

    def __init__(self, database_url: str, broadcast_url: str, folder: Path, **settings: str) -> None:
        self.database_url = database_url
        self.port = free_port()
        self.folder = folder
        self.log_path = folder / f"service-{self.port}.log"
        self.settings = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "DATABASE_URL": database_url,
            "BROADCAST_URL": broadcast_url,
            "SECRET_KEY": SECRET,
            "FIRST_ADMIN_USERNAME": ADMIN[0],
            "FIRST_ADMIN_PASSWORD": ADMIN[1],
            "LOG_FORMAT": "json",
            # Off, because hundreds of users register from this one address. Tests of rate limits turn them on.
            "RATE_LIMITS": "off",
            # Nearly every test registers a user and signs in, but few test the deliberate cost of hashing.
            "PASSWORD_MEMORY_KIB": "64",
            "PASSWORD_TIME_COST": "1",
            # A killed supervisor leaves its metrics folder in TMPDIR.
            "TMPDIR": str(folder),
            **settings,
        }
        self.process: subprocess.Popen[bytes] | nursery.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def under_uvicorn(self, *options: str) -> Service:
        """Serve the application with plain uvicorn instead of `python main.py`, and return this service."""
        self.settings["PYTHONPATH"] = str(ROOT)
        self.command = ("-m", "uvicorn", "main:app", "--port", str(self.port), "--app-dir", str(ROOT), *options)
        return self

    def start(self) -> Service:
        environment = {name: value for name, value in os.environ.items() if name not in self.settings}
        environment |= self.settings
        # The service runs in a folder without the developer's .env, and so leaves no file in the source tree.
        if self.command == Service.command and "WORKERS" not in self.settings:
            self.process = nursery.start(environment, self.folder, self.log_path)
        else:
            with self.log_path.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, *self.command],
                    env=environment,
                    cwd=self.folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                # Check the port first, because creating an HTTP client takes longer.
                if self._listens() and httpx.get(f"{self.url}/readyz", timeout=2, verify=NO_AUTHORITIES).is_success:
                    return self
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the service did not start:\n{self.log()[-4000:]}")
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send a signal to the process and its workers."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kill the process and its workers with SIGKILL."""
        if self.process is not None:
            if self.process.poll() is None:
                self.signal(signal.SIGKILL)
            self.process.wait()

    def stop(self, seconds: float = 20.0) -> int:
        """Stop the process with SIGTERM, as an orchestrator does, and return its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the service did not stop:\n{self.log()[-4000:]}") from None

    @contextmanager
    def running(self) -> Iterator[Service]:
        try:
            yield self.start()
        finally:
            self.kill()
            self.check_log()

    def check_log(self) -> None:
        """Assert that the log contains no secrets. This is asserted for every service that a test starts."""
        for line in self.log().splitlines():
            found = SECRETS.search(line)
            assert found is None, f"found a secret in the log, {found[0][:12]}…: {line[:400]}"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def memory_bytes(self) -> int:
        """Return the resident memory of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def add_genres(self, *names: str) -> Service:
        """Add genres as the admin, so that users can name them in movies. Existing ones are skipped."""
        with httpx.Client(base_url=self.url, timeout=60, verify=NO_AUTHORITIES) as client:
            user, password = ADMIN
            tokens = client.post("/auth/login", json={"username": user, "password": password}).json()
            headers = {"Authorization": f"Bearer {tokens['access_token']}"}
            rows = [{"name": name} for name in names]
            answer = client.post("/genres/bulk?on_error=skip", json=rows, headers=headers)
            assert answer.status_code == 201, answer.text
        return self

    # --- people

    @asynccontextmanager
    async def anyone(self, headers: Headers = None) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.url, timeout=60, verify=NO_AUTHORITIES, headers=headers) as client:
            yield client

    @asynccontextmanager
    async def person(self, name: str | None = None, headers: Headers = None) -> AsyncIterator[Person]:
        """Register a user, sign in, and yield the signed-in user."""
        name = name or f"user{next(_names)}-{os.getpid()}-{time.time_ns() % 10**9}"
        async with self.anyone(headers) as client:
            answer = await client.post("/auth/register", json={"username": name, "password": PASSWORD})
            assert answer.status_code == 201, answer.text
            yield await self._signed_in(client, name, PASSWORD)

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Person]:
        async with self.anyone() as client:
            yield await self._signed_in(client, *ADMIN)

    async def _signed_in(self, client: httpx.AsyncClient, name: str, password: str) -> Person:
        answer = await client.post("/auth/login", json={"username": name, "password": password})
        assert answer.status_code == 200, answer.text
        token = answer.json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        return Person(client, answer.json()["user_id"], name, token)

    # --- watchers

    async def position(self, seq: int) -> str:
        """Return the position `<epoch>:<seq>` with the current epoch."""
        async with self.anyone() as client:
            return f"{(await client.get('/events?limit=1')).json()['epoch']}:{seq}"

    @asynccontextmanager
    async def watch(self, query: str = "", **options: Any) -> AsyncIterator[Watcher]:
        """Open a websocket and read its welcome. `options` go to `websockets.connect`."""
        options = {"max_size": None, "max_queue": None, **options}
        async with connect(self.ws_url + (f"?{query}" if query else ""), **options) as socket_:
            watcher = Watcher(socket_)
            watcher.welcome = await watcher.next()
            assert watcher.welcome["operation"] == "welcome"
            yield watcher


@contextmanager
def several_services(
    number: int, database_url: str, broadcast_url: str, folder: Path, **settings: str
) -> Iterator[tuple[Service, ...]]:
    """Run several services on one database."""
    with ExitStack() as stack:
        services = [Service(database_url, broadcast_url, folder, **settings) for _ in range(number)]
        yield tuple(stack.enter_context(service.running()) for service in services)


@dataclass
class Person:
    """A signed-in user. `http` is a client that sends the user's access token."""

    http: httpx.AsyncClient
    id: int
    name: str
    token: str

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def forged(self, key: str = SECRET, algorithm: str = "HS256", headers: Any = None, **changes: Any) -> str:
        """Return the person's token with changed claims, signed again; a claim changed to None is left out."""
        claims = jwt.get_unverified_claims(self.token) | changes
        return str(jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm, headers=headers))

    async def add(self, resource: str = "movies", **fields: Any) -> dict[str, Any]:
        body = {"title": "The Third Man"} if resource == "movies" else {"name": "Harry Lime"}
        answer = await self.http.post(f"/{resource}", json=body | fields)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def generate(self, resource: str, number: int, query: str = "") -> dict[str, Any]:
        answer = await self.http.post(f"/{resource}/generate/{number}{query}")
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def generated(self, resource: str, number: int, query: str = "") -> dict[str, Any]:
        """Generate rows, wait until the job has ended, assert that it is done, and return the job."""
        ended = await self.job_ended((await self.generate(resource, number, query))["id"])
        assert ended["state"] == "done", ended
        return ended

    async def add_bulk(self, rows: list[dict[str, Any]], resource: str = "movies") -> list[dict[str, Any]]:
        answer = await self.http.post(f"/{resource}/bulk", json=rows)
        assert answer.status_code == 201, answer.text
        added: list[dict[str, Any]] = answer.json()["added"]
        return added

    async def delete_bulk(self, ids: list[int], resource: str = "movies") -> None:
        answer = await self.http.request("DELETE", f"/{resource}/bulk", json={"ids": ids})
        assert answer.status_code == 200, answer.text

    async def job_ended(self, job_id: str, seconds: float = 60.0) -> dict[str, Any]:
        async def ended() -> dict[str, Any] | None:
            job: dict[str, Any] = (await self.http.get(f"/jobs/{job_id}")).json()
            return job if job["state"] in ("done", "failed", "cancelled") else None

        found: dict[str, Any] = await eventually(ended, f"job {job_id} ends", seconds)
        return found


@dataclass
class Watcher:
    """A websocket that checks each frame against its schema and remembers the durable ones."""

    socket: ClientConnection
    welcome: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    asked: dict[int | str, Any] = field(default_factory=dict)  # the actions of sent messages, by id

    @property
    def seqs(self) -> list[int]:
        return [event["seq"] for event in self.events]

    async def next(self, seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """Return the next frame, of any kind."""
        async with asyncio.timeout(seconds):
            frame: dict[str, Any] = json.loads(await self.socket.recv())
        check_frame(frame, self.asked.get(frame.get("reply_to", "")))
        if "seq" in frame:
            self.events.append(frame)
        return frame

    async def expect(
        self, operation: str, topic: str | None = None, seconds: float = DEADLINE_SECONDS
    ) -> dict[str, Any]:
        """Skip ephemeral frames of other operations; return the next frame, which must fit `operation` and `topic`."""
        while True:
            frame = await self.next(seconds)
            if "seq" in frame or frame.get("operation") == operation:
                assert (frame["operation"], frame["topic"]) == (operation, topic or frame["topic"]), frame
                return frame

    async def sees(self, row: dict[str, Any], seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """Assert that the next durable event adds this row, and return the event."""
        event = await self.expect("add", seconds=seconds)
        assert event["data"] == row
        return event

    async def until(self, wanted: Callable[[dict[str, Any]], Any], seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """Read frames until `wanted(frame)` is true, and return that frame."""
        async with asyncio.timeout(seconds):
            while True:
                frame = await self.next(seconds)
                if wanted(frame):
                    return frame

    async def until_seq(self, seq: int, seconds: float = DEADLINE_SECONDS) -> None:
        async with asyncio.timeout(seconds):
            while not self.events or self.events[-1]["seq"] < seq:
                await self.next(seconds)

    async def send(self, message: Any) -> None:
        if isinstance(message, dict) and isinstance(message.get("id"), int | str):
            self.asked[message["id"]] = message.get("action")
        await self.socket.send(json.dumps(message))

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return its reply."""
        await self.send(message)
        return await self.until(lambda frame: frame.get("reply_to") == message.get("id") and "ok" in frame)
