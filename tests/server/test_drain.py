"""Stopping and restarting: clients are told to try again, neither operation takes long, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from core.settings import Settings
from core.stopping import GRACE_SECONDS, Stopping
from server import serving
from server import supervisor as workers
from tests.support.metrics import metric
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import ROOT, Person, Service, Watcher, eventually
from tests.support.sockets import crowd

CROWD = 300


def errors_in(log: str) -> list[str]:
    """Return the lines of a log that show errors or tracebacks."""
    found = []
    for line in log.splitlines():
        try:
            level = json.loads(line)["level"]
        except (ValueError, KeyError, TypeError):
            level = "critical" if "Traceback" in line or re.match(r"\w*(Error|Exception|Interrupt)\b", line) else ""
        if level in ("error", "critical"):
            found.append(line)
    return found


async def stop(service: Service, number: int = signal.SIGTERM, seconds: float = serving.STOP_SECONDS + 1) -> float:
    """Signal the main process, as an orchestrator does, and return the seconds until it has ended without errors."""
    begun = time.monotonic()
    process_of(service).send_signal(number)
    status = await asyncio.to_thread(process_of(service).wait, seconds)
    took = time.monotonic() - begun
    assert status == 0
    assert errors_in(service.log()) == []
    return took


def process_of(service: Service) -> Any:
    assert service.process is not None
    return service.process


async def code_of(watcher: Watcher) -> int | None:
    """Read until the connection is closed, and return its close code."""
    with suppress(ConnectionClosed):
        while True:
            await watcher.next()
    return watcher.socket.close_code


quiet_watchers = partial(crowd, query="topics=characters")


@asynccontextmanager
async def raw(
    service: Service, text: str, receives: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection and send `text`. With `receives`, the kernel buffers only about this many unread bytes."""
    socket_ = socket.socket()
    if receives is not None:
        # Set this before connecting, or the kernel lets the buffer grow to tens of megabytes.
        socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    socket_.connect(("127.0.0.1", service.port))
    reader, writer = await asyncio.open_connection(sock=socket_, limit=receives or 2**20)
    writer.write(text.replace("\n", "\r\n").encode())
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def half_a_request(alice: Person) -> str:
    head = (
        f"POST /movies HTTP/1.1\nHost: localhost\nAuthorization: Bearer {alice.token}\nContent-Type: application/json\n"
    )
    return head + 'Content-Length: 500\n\n{"title": "half'


def get(target: str, accept: str = "*/*") -> str:
    return f"GET {target} HTTP/1.1\nHost: localhost\nAccept: {accept}\n\n"


STREAM = get("/events?topics=characters", "text/event-stream")


async def rest_of(reader: asyncio.StreamReader) -> str:
    with suppress(ConnectionError):
        return (await reader.read()).decode()
    return ""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Return a function that creates services on SQLite, for tests that do not depend on the database."""
    with ExitStack() as stack:

        def make(**settings: str) -> Service:
            service = Service(f"sqlite:///{tmp_path}/marquee.db", "memory://", tmp_path, **settings)
            stack.callback(service.kill)
            return service

        yield make


async def test_a_stop_closes_every_connection_and_waits_for_no_client(small: Callable[..., Service]) -> None:
    """Stop a service with watchers, half a request body, an idle connection, a stream and a running job.

    Some of the watchers read nothing.
    """
    service = small().start()
    async with AsyncExitStack() as stack:
        alice = await stack.enter_async_context(service.person())
        watchers = await stack.enter_async_context(quiet_watchers(CROWD, service))
        deaf = [await stack.enter_async_context(service.watch("topics=movies", max_queue=1)) for _ in range(5)]
        reading = await stack.enter_async_context(service.watch("topics=movies,jobs"))
        half, idle, stream = [
            (await stack.enter_async_context(raw(service, text)))[0]
            for text in (half_a_request(alice), get("/healthz"), STREAM)
        ]
        assert b"200" in await idle.readline()
        assert b"200" in await stream.readline()
        job = await alice.generate("movies", 30_000, "?rate=6000&batch_size=300")
        await reading.until(lambda frame: frame["operation"] == "add_bulk")

        ends = asyncio.gather(*(code_of(watcher) for watcher in (*watchers, reading)))
        took = await stop(service)

        assert set(await ends) == {1012}
        answer = await rest_of(half)
        assert answer.startswith("HTTP/1.1 503")
        assert "retry-after: 1" in answer.lower()
        await rest_of(idle)
        assert (await rest_of(stream)).endswith("\r\n0\r\n\r\n"), "the stream ends properly"
        assert took < 6, "the job, the half body, the stream or an unread socket delayed the stop"
        for watcher in deaf:
            await code_of(watcher)

    service.start()
    position, epoch = reading.seqs[-1], reading.welcome["data"]["epoch"]
    async with service.watch(f"since={position}&epoch={epoch}") as after:
        await after.until(lambda frame: frame.get("data", {}).get("state") == "done" and "seq" in frame, 60)
        assert after.seqs == list(range(position + 1, position + 1 + len(after.seqs)))
    ids = [
        row["id"]
        for event in (*reading.events, *after.events)
        if (event["operation"], event["topic"]) == ("add_bulk", "movies")
        for row in event["data"]["items"]
    ]
    assert len(ids) == len(set(ids)) == 30_000, "the job continued where it had stopped"
    async with service.anyone() as client:
        assert (await client.get("/movies/count")).json()["count"] == 30_000
        assert (await client.get(f"/jobs/{job['id']}")).json()["done"] == 30_000


async def test_a_draining_service_is_not_ready_and_still_serves(small: Callable[..., Service]) -> None:
    """Load balancers have DRAIN_SECONDS to notice that the service is stopping."""
    # Long enough, even on a busy machine, for the steps below to finish before connections are closed.
    service = small(DRAIN_SECONDS="5").start()
    async with service.person() as alice, service.watch() as watcher:
        stopping = asyncio.create_task(stop(service))
        refused = await eventually(lambda: _not_ready(alice.http), "the service is not ready", 4.5)
        assert refused["checks"]["service"] == "stopping"
        await watcher.sees(await alice.add())
        async with service.watch() as late:
            assert await code_of(late) == 1012
        assert await code_of(watcher) == 1012
        assert 5 <= await stopping < 9


async def _not_ready(client: httpx.AsyncClient) -> Any:
    answer = await client.get("/readyz")
    return answer.json() if answer.status_code == 503 else None


@asynccontextmanager
async def unread_responses(service: Service) -> AsyncIterator[None]:
    """Request large responses, and do not read them."""
    async with service.admin() as admin:
        await admin.add_bulk([{"title": f"movie {number}", "description": '"' * 9_000} for number in range(460)])
    # Each response has eight megabytes, because each quotation mark becomes two characters. The kernel buffers at most
    # four, so the response cannot be sent completely.
    async with AsyncExitStack() as stack:
        for _ in range(4):
            reader, _ = await stack.enter_async_context(raw(service, get("/movies?limit=460"), receives=2**16))
            assert b"200" in await reader.readline()
        yield


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_second_signal_skips_the_waiting(small: Callable[..., Service], workers: str) -> None:
    service = small(WORKERS=workers).start()
    async with unread_responses(service):
        process_of(service).send_signal(signal.SIGTERM)
        await eventually(lambda: '"event": "shutdown started"' in service.log(), "the stop has begun")
        with pytest.raises(subprocess.TimeoutExpired):
            await asyncio.to_thread(process_of(service).wait, 1.0)
        assert await stop(service) < 3


async def test_an_unread_response_delays_a_stop_only_for_a_while(small: Callable[..., Service]) -> None:
    service = small().start()
    async with unread_responses(service):
        assert serving.REQUEST_SECONDS - 1 < await stop(service) < serving.STOP_SECONDS


async def test_a_frozen_database_does_not_delay_a_stop(
    own_postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path
) -> None:
    """A write and a handshake that wait for the database are rejected with 503."""
    service = Service(own_postgres.create_database(), own_redis.url, tmp_path)
    with service.running():
        async with service.person() as alice, service.watch() as watcher:
            with own_postgres.frozen():
                before = open_files(service.pid)
                write = asyncio.create_task(alice.http.post("/movies", json={"title": "The Third Man"}))
                handshake = asyncio.create_task(service.watch().__aenter__())
                await eventually(lambda: open_files(service.pid) > before, "the handshake is accepted")
                await asyncio.sleep(0.2)  # wait until the service has read both requests and waits for the database
                assert await stop(service) < serving.STOP_SECONDS + 0.5
                with pytest.raises(InvalidStatus) as refused:
                    await handshake
                assert refused.value.response.status_code == 503
                assert (await write).status_code == 503
                assert await code_of(watcher) == 1012


def metrics_folders(folder: Path) -> list[Path]:
    return list(folder.glob("marquee-metrics-*"))


def open_files(pid: int) -> int:
    """Return how many files a process has open, including sockets."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_several_workers_stop_together(small: Callable[..., Service], tmp_path: Path, number: int) -> None:
    service = small(WORKERS="2", TMPDIR=str(tmp_path)).start()
    assert metrics_folders(tmp_path)
    async with quiet_watchers(40, service) as watchers, service.person() as alice:
        await alice.generate("movies", 30_000, "?rate=6000&batch_size=300")
        await eventually(lambda: '"event": "job started"' in service.log(), "the job has begun")
        ends = asyncio.gather(*(code_of(watcher) for watcher in watchers))
        assert await stop(service, number) < 6
        assert set(await ends) == {1012}
    assert '"event": "job released"' in service.log()
    assert not metrics_folders(tmp_path), "the folder of the workers' metrics is deleted"


@pytest.mark.parametrize(
    ("workers", "moment"), [("1", "Marquee is running"), ("1", "request"), ("2", "worker started"), ("2", "request")]
)
async def test_ctrl_c_prints_no_traceback(small: Callable[..., Service], workers: str, moment: str) -> None:
    """A terminal sends SIGINT to the whole process group, at any moment."""
    service = small(WORKERS=workers)
    starting = asyncio.create_task(asyncio.to_thread(service.start))
    await eventually(lambda: moment in service.log(), moment)
    service.signal(signal.SIGINT)
    assert await asyncio.to_thread(process_of(service).wait, 10) == 0
    with suppress(AssertionError):
        await starting
    assert errors_in(service.log()) == []


async def test_a_signal_also_begins_the_stop_under_plain_uvicorn(small: Callable[..., Service]) -> None:
    """By itself, uvicorn would wait for the rest of the request body and for the event stream, which never ends."""
    service = small().under_uvicorn().start()
    async with service.person() as alice, service.watch() as watcher:
        async with raw(service, half_a_request(alice)) as (half, _), raw(service, STREAM) as (stream, _):
            assert b"200" in await stream.readline()
            process_of(service).terminate()
            assert (await rest_of(half)).startswith("HTTP/1.1 503")
            await rest_of(stream)
            assert await code_of(watcher) == 1012
            # uvicorn raises the signal again after a graceful stop.
            assert await asyncio.to_thread(process_of(service).wait, 10) in (0, -signal.SIGTERM)
    assert errors_in(service.log()) == []


def workers_of(service: Service) -> set[int]:
    """Return the pids of the workers that have logged their start and are alive."""

    def is_alive(pid: int) -> bool:
        with suppress(OSError):
            return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        return False

    started = re.findall(r'"worker": (\d+), "event": "worker started"', service.log())
    return {int(pid) for pid in started if is_alive(int(pid))}


async def test_a_stop_calls_every_listener_while_a_timeout_expires() -> None:
    stopping, is_expiring = Stopping(), asyncio.Event()
    called: list[str] = []

    def fails() -> None:
        raise RuntimeError("a listener fails")

    async def wait(seconds: float, is_expiring: asyncio.Event) -> None:
        async with stopping.timeout(seconds):
            try:
                await asyncio.Event().wait()
            finally:
                is_expiring.set()
                await asyncio.sleep(0.05)  # simulate a clean-up that takes a moment

    stopping.on_stop += [lambda: called.append("first"), fails, lambda: called.append("last")]
    short = asyncio.create_task(wait(0.01, is_expiring))
    long = asyncio.create_task(wait(60, asyncio.Event()))
    await is_expiring.wait()
    begun = time.monotonic()
    stopping.begin()
    assert called == ["first", "last"]
    for waiting in (short, long):
        with pytest.raises(TimeoutError):
            await waiting
    assert time.monotonic() - begun < GRACE_SECONDS + 2


async def test_a_rolling_restart_replaces_every_worker_without_draining(small: Callable[..., Service]) -> None:
    """`tests/chaos/test_rolling_restart.py` tests how clients experience a rolling restart."""
    service = small(WORKERS="2", DRAIN_SECONDS="60").start()
    before = workers_of(service)
    process_of(service).send_signal(signal.SIGHUP)
    await eventually(lambda: service.log().count('"worker replaced"') == 2, "both workers are replaced", 50)
    await eventually(lambda: len(workers_of(service)) == 2, "the old workers have ended")
    assert workers_of(service).isdisjoint(before)
    assert errors_in(service.log()) == []


async def test_a_worker_that_dies_is_replaced_and_its_gauges_are_dropped(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2").start()

    async def sockets_counted(number: int) -> bool:
        with suppress(httpx.TransportError):
            return await metric(service, "marquee_websocket_connections") == number
        return False

    async with quiet_watchers(20, service) as watchers:
        await eventually(lambda: sockets_counted(20), "the sockets of both workers are counted")
        busy = max(workers_of(service), key=open_files)
        os.kill(busy, signal.SIGKILL)
        await eventually(lambda: len(workers_of(service) - {busy}) == 2, "another worker is started")
        ends = [asyncio.create_task(code_of(watcher)) for watcher in watchers]
        await eventually(lambda: any(end.done() for end in ends), "the sockets of the killed worker are cut")
        # Count the ended sockets again each time, because those of the killed worker do not all end at the same moment.
        await eventually(lambda: sockets_counted(sum(not end.done() for end in ends)), "dead sockets are not counted")
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
    assert await stop(service) < 6


SUPERVISOR = """
import sys
from core import logs, settings
from server import serving, supervisor

{change}
found = settings.load_settings()
logs.configure("json", "info")
sys.exit(supervisor.Supervisor(found, "{app}", serving.listen(found)).run(print))
"""


def supervised(service: Service, app: str, change: str = "") -> Service:
    service.settings |= {"WORKERS": "2", "PYTHONPATH": str(ROOT)}
    service.command = ("-c", SUPERVISOR.format(app=app, change=change))
    return service


async def test_a_worker_that_dies_young_repeatedly_is_started_after_longer_pauses(
    small: Callable[..., Service],
) -> None:
    service = supervised(small(), "main:worker", "supervisor.STEADY_SECONDS = 3600.0").start()
    seen = sorted(workers_of(service))

    def have_started(number: int) -> bool:
        return service.log().count('"worker started"') == number

    for starts in (3, 4):
        await eventually(lambda: len(workers_of(service)) == 2, "two workers are alive")
        newest = [pid for pid in workers_of(service) if pid not in seen] or seen[:1]
        seen += newest
        os.kill(newest[0], signal.SIGKILL)
        await eventually(partial(have_started, starts), "another worker is started")
    lines = [json.loads(line) for line in service.log().splitlines() if line.startswith("{")]
    times = [
        (line["event"], datetime.fromisoformat(line["timestamp"])) for line in lines if line.get("logger") == "workers"
    ]
    died = [at for event, at in times if event.startswith("worker died")]
    started = [at for event, at in times if event == "worker started"][2:]
    pauses = [(after - before).total_seconds() for before, after in zip(died, started, strict=True)]
    assert 0.9 < pauses[0] < 1.9 < pauses[1]
    await stop(service)


def test_pauses_double_up_to_a_bound_until_a_worker_has_lived_long_enough() -> None:
    pauses, pause = [], 0.0
    config = serving.server_config(Settings(), "main:worker")
    with socket.socket() as listener:
        for lived in (0.1, 0.1, 0.1, 0.1, 0.1, workers.STEADY_SECONDS, 0.1):
            worker = workers.Worker(config, listener, 0)
            worker.pause, worker.has_served = pause, True
            worker.died(worker.since + lived)
            pauses.append(pause := worker.pause)
    assert pauses == [1, 2, 4, 8, 10, 0, 1]


async def test_workers_do_not_outlive_their_supervisor(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2").start()
    async with service.watch() as watcher:
        process_of(service).kill()
        assert await code_of(watcher) == 1012
        await eventually(lambda: not workers_of(service), "the workers stop", 10)
    assert errors_in(service.log()) == []


async def test_workers_that_are_starting_do_not_outlive_their_supervisor(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2")
    starting = asyncio.create_task(asyncio.to_thread(service.start))
    await eventually(lambda: service.log().count("worker started") == 2, "both workers are starting")
    process_of(service).kill()
    with suppress(AssertionError):  # `start` fails unless the service became ready before the kill
        await starting
    await eventually(lambda: not workers_of(service), "the workers stop", 15)


async def test_workers_that_cannot_start_stop_the_service(small: Callable[..., Service]) -> None:
    service = supervised(small(), "main:no_such_app")
    with pytest.raises(AssertionError, match="did not start"):
        await asyncio.to_thread(service.start)
    assert process_of(service).returncode == 3
    assert "worker start failed" in service.log()


async def test_a_worker_that_cannot_start_is_tried_again_after_others_have_worked(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    service = Service(own_postgres.create_database(), "memory://", tmp_path, WORKERS="2")
    with service.running():
        async with service.anyone() as client:
            await eventually(lambda: service.log().count("worker ready") == 2, "both workers are ready")
            own_postgres.kill()
            os.kill(workers_of(service).pop(), signal.SIGKILL)
            await eventually(
                lambda: service.log().count("worker died") >= 2, "the new worker cannot start without a database", 90
            )
            own_postgres.start()

            async def is_ready() -> bool:
                with suppress(httpx.TransportError):
                    return (await client.get("/readyz")).status_code == 200
                return False

            await eventually(is_ready, "the service works again")
            assert process_of(service).poll() is None
