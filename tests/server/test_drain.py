"""The stop and the restart: who is told what, how long it takes, and that nothing is lost by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
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
from tests.conftest import Places
from tests.support.servers import PostgresServer, RedisServer
from tests.support.service import ROOT, Person, Service, Watcher, eventually

CROWD = 300


def errors_in(log: str) -> list[str]:
    """Lines that an operator would be woken for, tracebacks included."""
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
    """As an orchestrator does: the one process is told. Answers the seconds that it took; it must end with status 0."""
    assert service.process is not None
    begun = time.monotonic()
    service.process.send_signal(number)
    status = await asyncio.to_thread(service.process.wait, seconds)
    took = time.monotonic() - begun
    assert status == 0
    assert errors_in(service.log()) == []
    return took


async def code_of(watcher: Watcher) -> int | None:
    """Read on to the end."""
    with suppress(ConnectionClosed):
        while True:
            await watcher.next()
    return watcher.socket.close_code


async def enter(stack: AsyncExitStack, service: Service, number: int) -> list[Watcher]:
    """Watchers of a quiet topic."""
    watchers = (stack.enter_async_context(service.watch("topics=characters")) for _ in range(number))
    return await asyncio.gather(*watchers)


@asynccontextmanager
async def raw(
    service: Service, text: str, receives: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which this much has been sent; takes about `receives` bytes that nobody reads, if given."""
    socket_ = socket.socket()
    if receives is not None:
        # Before the connection: otherwise the kernel lets the buffer grow, to tens of megabytes.
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


async def rest_of(reader: asyncio.StreamReader) -> str:
    with suppress(ConnectionError):
        return (await reader.read()).decode()
    return ""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Services on SQLite, where what is tested is the process and not the database."""
    made: list[Service] = []

    def make(**settings: str) -> Service:
        made.append(Service(f"sqlite:///{tmp_path}/{len(made)}.db", "memory://", tmp_path, **settings))
        return made[-1]

    yield make
    for each in made:
        each.kill()


async def test_a_stop_tells_everybody_and_waits_for_nobody_who_does_not_listen(
    new_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    """A crowd of watchers, some of whom read nothing, a job at work, half a body, an idle connection, and a stream."""
    places = new_places()
    service = new_service(places).start()
    async with AsyncExitStack() as stack:
        alice = await stack.enter_async_context(service.person())
        crowd = await enter(stack, service, CROWD)
        deaf = [await stack.enter_async_context(service.watch("topics=movies", max_queue=1)) for _ in range(5)]
        reading = await stack.enter_async_context(service.watch("topics=movies,jobs"))
        head = f"POST /movies HTTP/1.1\nHost: x\nAuthorization: Bearer {alice.token}\nContent-Type: application/json\n"
        half, _ = await stack.enter_async_context(raw(service, head + 'Content-Length: 500\n\n{"title": "half'))
        idle, _ = await stack.enter_async_context(raw(service, "GET /healthz HTTP/1.1\nHost: x\n\n"))
        assert b"200" in await idle.readline()
        stream, _ = await stack.enter_async_context(
            raw(service, "GET /events?topics=characters HTTP/1.1\nHost: x\nAccept: text/event-stream\n\n")
        )
        assert b"200" in await stream.readline()
        job = await alice.generate("movies", 30_000, "?rate=6000&batch_size=300")
        await reading.until(lambda frame: frame["operation"] == "add_bulk")

        ends = asyncio.gather(*(code_of(watcher) for watcher in (*crowd, reading)))
        took = await stop(service)

        assert set(await ends) == {1012}
        answer = await rest_of(half)
        assert answer.startswith("HTTP/1.1 503")
        assert "retry-after: 1" in answer.lower()
        await rest_of(idle)
        await rest_of(stream)
        assert took < 6, "the job, the body, the stream and those who read nothing did not hold it up"
        for watcher in deaf:
            await code_of(watcher)

    service.start()
    await _the_job_went_on_exactly(service, alice, job["id"], reading)


async def _the_job_went_on_exactly(service: Service, alice: Person, job_id: str, before: Watcher) -> None:
    position = before.seqs[-1]
    async with service.watch(f"since={position}&epoch={before.welcome['data']['epoch']}&topics=movies,jobs") as after:
        await after.until(lambda frame: frame.get("data", {}).get("state") == "done" and "seq" in frame, 60)
        assert after.seqs == list(range(position + 1, position + 1 + len(after.seqs)))
    ids = [
        row["id"]
        for event in (*before.events, *after.events)
        if event["operation"] == "add_bulk"
        for row in event["data"]["items"]
    ]
    assert len(ids) == len(set(ids)) == 30_000
    async with httpx.AsyncClient(base_url=service.url) as client:
        assert (await client.get("/movies/count")).json()["count"] == 30_000
        assert (await client.get(f"/jobs/{job_id}")).json()["done"] == 30_000


async def test_load_balancers_have_time_to_notice(small: Callable[..., Service]) -> None:
    """Not ready, and everything is served as before, for DRAIN_SECONDS."""
    # Long enough for all of the scene on a busy machine: it has to be over before the stop begins.
    service = small(DRAIN_SECONDS="5").start()
    async with service.person() as alice, service.watch() as watcher:
        stopping = asyncio.create_task(stop(service))
        refused = await eventually(lambda: _not_ready(alice.http), "it is not ready", 4.5)
        assert refused["checks"]["service"] == "stopping"
        movie = await alice.add()
        assert (await watcher.expect("add"))["data"] == movie
        async with service.watch() as late:
            assert await code_of(late) == 1012
        assert await code_of(watcher) == 1012
        assert 5 <= await stopping < 9


async def _not_ready(client: httpx.AsyncClient) -> Any:
    answer = await client.get("/readyz")
    return answer.json() if answer.status_code == 503 else None


@asynccontextmanager
async def somebody_who_takes_no_answer(service: Service) -> AsyncIterator[None]:
    """A large answer that is asked for and not read."""
    async with service.admin() as admin:
        rows = [{"title": f"movie {number}", "description": "x" * 9_000} for number in range(1_000)]
        assert (await admin.http.post("/movies/bulk", json=rows)).status_code == 201
    # The answer has nine megabytes, and the kernel takes at most four of what is sent: so the very first answer of a
    # connection never ends, from its status line on.
    request = "GET /movies?limit=1000 HTTP/1.1\nHost: x\n\n"
    async with AsyncExitStack() as stack:
        for _ in range(4):
            reader, _ = await stack.enter_async_context(raw(service, request, receives=2**16))
            assert b"200" in await reader.readline()
        yield


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_told_twice_it_waits_for_nobody(small: Callable[..., Service], workers: str) -> None:
    service = small(WORKERS=workers).start()
    async with somebody_who_takes_no_answer(service):
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        await eventually(lambda: '"event": "shutdown started"' in service.log(), "the stop has begun")
        with pytest.raises(subprocess.TimeoutExpired):
            await asyncio.to_thread(service.process.wait, 1.0)
        assert await stop(service) < 3


async def test_an_answer_that_nobody_takes_does_not_hold_it_up_for_long(small: Callable[..., Service]) -> None:
    service = small().start()
    async with somebody_who_takes_no_answer(service):
        assert serving.REQUEST_SECONDS - 1 < await stop(service) < serving.STOP_SECONDS


async def test_a_database_that_hangs_does_not_hold_it_up(
    own_postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path
) -> None:
    """A write and a handshake wait for it: both are told."""
    service = Service(own_postgres.create_database(), own_redis.url, tmp_path)
    with service.running():
        async with service.person() as alice, service.watch() as watcher:
            with own_postgres.frozen():
                before = len(open_files(service))
                write = asyncio.create_task(alice.http.post("/movies", json={"title": "The Third Man"}))
                handshake = asyncio.create_task(service.watch().__aenter__())
                await eventually(lambda: len(open_files(service)) > before, "the handshake is accepted")
                await asyncio.sleep(0.2)  # both have been read, and wait for the database
                took = await stop(service)
                assert took < serving.STOP_SECONDS + 0.5
                with pytest.raises(InvalidStatus) as refused:
                    await handshake
                assert refused.value.response.status_code == 503
                assert (await write).status_code == 503
                assert await code_of(watcher) == 1012


def open_files(service: Service) -> list[Path]:
    """Return the file descriptors of a service, sockets among them."""
    assert service.process is not None
    return list(Path(f"/proc/{service.process.pid}/fd").iterdir())


def metrics_folders(folder: Path) -> list[Path]:
    return list(folder.glob("marquee-metrics-*"))


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_several_workers_stop_together(small: Callable[..., Service], tmp_path: Path, number: int) -> None:
    service = small(WORKERS="2", TMPDIR=str(tmp_path)).start()
    assert metrics_folders(tmp_path)
    async with AsyncExitStack() as stack:
        crowd = await enter(stack, service, 40)
        alice = await stack.enter_async_context(service.person())
        await alice.generate("movies", 30_000, "?rate=6000&batch_size=300")
        await eventually(lambda: '"event": "job started"' in service.log(), "the job has begun")
        ends = asyncio.gather(*(code_of(watcher) for watcher in crowd))
        assert await stop(service, number) < 6
        assert set(await ends) == {1012}
    assert '"event": "job released"' in service.log()
    assert not metrics_folders(tmp_path), "the folder that the workers counted into is removed"


@pytest.mark.parametrize(
    ("workers", "moment"), [("1", "Marquee is on air"), ("1", "request"), ("2", "worker started"), ("2", "request")]
)
async def test_ctrl_c_prints_no_traceback(small: Callable[..., Service], workers: str, moment: str) -> None:
    """A terminal sends it to the whole group, at whatever moment."""
    service = small(WORKERS=workers)
    starting = asyncio.create_task(asyncio.to_thread(service.start))
    await eventually(lambda: moment in service.log(), moment)
    service.signal(signal.SIGINT)
    assert service.process is not None
    assert await asyncio.to_thread(service.process.wait, 10) == 0
    with suppress(AssertionError):
        await starting
    assert errors_in(service.log()) == []


async def test_under_another_server_the_signal_begins_the_stop(small: Callable[..., Service]) -> None:
    """Half a body and an event stream would hold plain uvicorn up for ever."""
    service = small(PYTHONPATH=str(ROOT))
    service.command = ("-m", "uvicorn", "main:app", "--port", str(service.port), "--app-dir", str(ROOT))
    service.start()
    async with service.person() as alice, service.watch() as watcher:
        head = f"POST /movies HTTP/1.1\nHost: x\nAuthorization: Bearer {alice.token}\nContent-Type: application/json\n"
        async with (
            raw(service, head + 'Content-Length: 500\n\n{"title": "half') as (half, _),
            raw(service, "GET /events HTTP/1.1\nHost: x\nAccept: text/event-stream\n\n") as (stream, _),
        ):
            assert b"200" in await stream.readline()
            assert service.process is not None
            service.process.terminate()
            assert (await rest_of(half)).startswith("HTTP/1.1 503")
            await rest_of(stream)
            assert await code_of(watcher) == 1012
            # uvicorn raises the signal again, after an orderly stop.
            assert await asyncio.to_thread(service.process.wait, 10) in (0, -signal.SIGTERM)
    assert errors_in(service.log()) == []


class Follower:
    """A watcher that comes back and resumes wherever it is sent away."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.seqs: list[int] = []
        self.codes: list[int | None] = []
        self.longest_silence = 0.0
        self._ended_at = 0.0
        self._epoch = ""

    async def follow(self) -> None:
        while True:
            query = f"since={self.seqs[-1]}&epoch={self._epoch}" if self.seqs else "since=0"
            with suppress(OSError, InvalidStatus, ConnectionClosed):
                async with self.service.watch(f"{query}&topics=movies") as watcher:
                    self._epoch = watcher.welcome["data"]["epoch"]
                    if self._ended_at:
                        self.longest_silence = max(self.longest_silence, time.monotonic() - self._ended_at)
                    try:
                        while True:
                            frame = await watcher.next()
                            assert frame["operation"] != "resync"
                            if "seq" in frame:
                                self.seqs.append(frame["seq"])
                    except ConnectionClosed:
                        self.codes.append(watcher.socket.close_code)
                        self._ended_at = time.monotonic()
            await asyncio.sleep(0.05)


async def write_until(service: Service, token: str, done: asyncio.Event) -> list[int]:
    """Writes that are sent again when a connection ends under them. Answers the ids."""
    ids: list[int] = []
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=30) as client:
        while not done.is_set():
            key = {"Idempotency-Key": f"write-{len(ids)}"}
            with suppress(httpx.TransportError):
                answer = await client.post("/movies", json={"title": f"movie {len(ids)}"}, headers=key)
                if answer.status_code == 201:
                    ids.append(answer.json()["id"])
                else:
                    assert answer.status_code == 503
    return ids


def workers_of(service: Service) -> set[int]:
    """The processes that serve, by what they have said of themselves."""
    log = service.log()
    started = {int(pid) for pid in re.findall(r'"worker": (\d+), "event": "worker started"', log)}
    return {pid for pid in started if Path(f"/proc/{pid}/cmdline").exists() and _is_awake(pid)}


def _is_awake(pid: int) -> bool:
    with suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


async def test_a_stop_that_begins_as_a_timeout_runs_out_tells_everybody() -> None:
    stopping, on_its_way_out = Stopping(), asyncio.Event()
    told: list[str] = []

    def fails() -> None:
        raise RuntimeError("a listener of ours is wrong")

    stopping.on_stop += [lambda: told.append("first"), fails, lambda: told.append("last")]
    runs_out = asyncio.create_task(_run_out(stopping, 0.01, on_its_way_out))
    lasts = asyncio.create_task(_run_out(stopping, 60, asyncio.Event()))
    await on_its_way_out.wait()
    begun = time.monotonic()
    stopping.begin()
    assert told == ["first", "last"]
    for late in (runs_out, lasts):
        with pytest.raises(TimeoutError):
            await late
    assert time.monotonic() - begun < GRACE_SECONDS + 2


async def _run_out(stopping: Stopping, seconds: float, on_its_way_out: asyncio.Event) -> None:
    async with stopping.timeout(seconds):
        try:
            await asyncio.Event().wait()
        finally:
            on_its_way_out.set()
            await asyncio.sleep(0.05)  # it takes a moment to clean up


async def test_a_rolling_restart_loses_nothing_and_leaves_nobody_alone(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2", DRAIN_SECONDS="30").start()  # nobody needs to notice: it is not waited for
    before = workers_of(service)
    done = asyncio.Event()
    async with service.person() as alice:
        followers = [Follower(service) for _ in range(30)]
        following = [asyncio.create_task(follower.follow()) for follower in followers]
        writing = asyncio.create_task(write_until(service, alice.token, done))
        await eventually(lambda: all(follower.seqs for follower in followers), "everybody follows")
        assert service.process is not None
        service.process.send_signal(signal.SIGHUP)
        await eventually(lambda: service.log().count('"worker replaced"') == 2, "both are replaced")
        await eventually(lambda: len(workers_of(service)) == 2, "the old ones are gone")
        await eventually(lambda: all(follower.codes for follower in followers), "everybody was sent away")
        done.set()
        ids = await writing
        last = len(ids)
        await eventually(lambda: all(len(follower.seqs) >= last for follower in followers), "everybody has everything")
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        assert len(set(ids)) == len(ids)
        assert (await alice.http.get("/movies/count")).json()["count"] == len(ids)
    assert workers_of(service).isdisjoint(before)
    for follower in followers:
        assert follower.seqs == list(range(follower.seqs[0], follower.seqs[0] + len(ids)))
        assert set(follower.codes) == {1012}
        assert follower.longest_silence < 3
    assert errors_in(service.log()) == []


async def test_a_worker_that_dies_is_replaced_and_its_gauges_are_forgotten(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2").start()
    async with AsyncExitStack() as stack:
        crowd = await enter(stack, service, 20)
        async with service.anyone() as client:
            await eventually(lambda: _open_websockets(client, 20), "all are counted, on whichever worker")
            busy = max(workers_of(service), key=lambda pid: len(list(Path(f"/proc/{pid}/fd").iterdir())))
            os.kill(busy, signal.SIGKILL)
            await eventually(lambda: len(workers_of(service) - {busy}) == 2, "another is started")
            ends = [asyncio.create_task(code_of(watcher)) for watcher in crowd]
            await eventually(lambda: any(end.done() for end in ends), "its sockets are cut")
            # Counted anew each time: when the first of its sockets has ended, others may be about to.
            await eventually(
                lambda: _open_websockets(client, sum(not end.done() for end in ends)),
                "the dead worker's are counted no more",
            )
            for end in ends:
                end.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*ends, return_exceptions=True)
    assert await stop(service) < 6


EVERY_WORKER_IS_YOUNG = """
import sys
from core import logs, settings
from server import serving, supervisor

supervisor.STEADY_SECONDS = 3600.0
found = settings.load_settings()
logs.configure("json", "info")
sys.exit(supervisor.Supervisor(found, "main:worker", serving.listen(found)).run(print))
"""


async def test_a_worker_that_dies_young_again_and_again_is_started_after_longer_and_longer_pauses(
    small: Callable[..., Service],
) -> None:
    service = small(WORKERS="2", PYTHONPATH=str(ROOT))
    service.command = ("-c", EVERY_WORKER_IS_YOUNG)
    service.start()
    seen = sorted(workers_of(service))
    for starts in (3, 4):
        await eventually(lambda: len(workers_of(service)) == 2, "another is started")
        newest = [pid for pid in workers_of(service) if pid not in seen] or seen[:1]
        seen += newest
        os.kill(newest[0], signal.SIGKILL)
        await eventually(partial(_has_started, service, starts), "another is started")
    times = [(entry["event"], datetime.fromisoformat(entry["timestamp"])) for entry in _said(service)]
    died = [at for event, at in times if event.startswith("worker died")]
    started = [at for event, at in times if event == "worker started"][2:]
    pauses = [(after - before).total_seconds() for before, after in zip(died, started, strict=True)]
    assert 0.9 < pauses[0] < 1.9 < pauses[1]
    await stop(service)


def _has_started(service: Service, number: int) -> bool:
    return service.log().count('"worker started"') == number


def _said(service: Service) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in service.log().splitlines() if line.startswith("{"))
    return [line for line in lines if line.get("logger") == "workers"]


def test_pauses_double_up_to_a_bound_and_end_with_a_worker_that_has_lived() -> None:
    pauses, pause = [], 0.0
    config = serving.server_config(Settings(), "main:worker")
    with socket.socket() as listener:
        for lived in (0.1, 0.1, 0.1, 0.1, 0.1, workers.STEADY_SECONDS, 0.1):
            worker = workers.Worker(config, listener, 0)
            worker.pause, worker.has_served = pause, True
            worker.died(worker.since + lived)
            pauses.append(pause := worker.pause)
    assert pauses == [1, 2, 4, 8, 10, 0, 1]


async def _open_websockets(client: httpx.AsyncClient, expected: int) -> bool:
    with suppress(httpx.TransportError):
        text = (await client.get("/metrics", headers={"Connection": "close"})).text
        found = re.search(r"^marquee_websocket_connections (\S+)$", text, re.MULTILINE)
        return found is not None and float(found[1]) == expected
    return False


async def test_workers_do_not_outlive_their_supervisor(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2").start()
    async with service.watch() as watcher:
        assert service.process is not None
        service.process.kill()
        assert await code_of(watcher) == 1012
        await eventually(lambda: not workers_of(service), "they stop in order, by themselves", 10)
    assert errors_in(service.log()) == []


async def test_nor_do_those_that_it_had_only_just_started(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2")
    starting = asyncio.create_task(asyncio.to_thread(service.start))
    await eventually(lambda: service.log().count("worker started") == 2, "both are on their way")
    assert service.process is not None
    service.process.kill()
    with suppress(AssertionError):  # it never came to serve, or did for a moment
        await starting
    await eventually(lambda: not workers_of(service), "they stop by themselves", 15)


NO_SUCH_APP = """
import sys
from core import logs, settings
from server import serving, supervisor

found = settings.load_settings()
logs.configure("json", "info")
sys.exit(supervisor.Supervisor(found, "main:no_such_app", serving.listen(found)).run(print))
"""


async def test_workers_that_cannot_start_stop_the_service(small: Callable[..., Service]) -> None:
    service = small(WORKERS="2", PYTHONPATH=str(ROOT))
    service.command = ("-c", NO_SUCH_APP)
    with pytest.raises(AssertionError, match="did not start"):
        await asyncio.to_thread(service.start)
    assert service.process is not None
    assert service.process.returncode == 3
    assert "worker start failed" in service.log()


async def test_once_it_has_worked_a_worker_that_cannot_start_is_tried_again(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    service = Service(own_postgres.create_database(), "memory://", tmp_path, WORKERS="2")
    with service.running():
        async with service.anyone() as client:
            await eventually(lambda: service.log().count("worker ready") == 2, "the supervisor knows that they work")
            own_postgres.kill()
            os.kill(_one_of_the_children(service), signal.SIGKILL)
            await eventually(lambda: service.log().count("worker died") >= 2, "it cannot start without a database", 90)
            own_postgres.start()

            async def is_ready() -> bool:
                with suppress(httpx.TransportError):
                    return (await client.get("/readyz")).status_code == 200
                return False

            await eventually(is_ready, "it works again")
            assert service.process is not None
            assert service.process.poll() is None


def _one_of_the_children(service: Service) -> int:
    assert service.process is not None
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
