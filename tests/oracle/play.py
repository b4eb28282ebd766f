"""The oracle: writers and watchers act at random, and at each quiet point every view must equal the database.

`World` has the workers, writers and watchers, and knows the expected rows. A state machine drives it (see
`test_oracle`): hypothesis draws each step, and the world carries it out in the event loop of another thread, so that
writers write and watchers read while the next step is drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlencode

from core.times import utc_text
from schemas import MAX_BODY_BYTES
from tests.oracle.client import Client, Watched
from tests.oracle.filters import GENRES, Wanted, matches, query, resolved
from tests.oracle.http import Rest
from tests.oracle.truth import PAGE, Truth, walk
from tests.oracle.views import Place, Rows, View
from tests.oracle.writes import ADMIN, CATALOG, Batch, Known, Write, call
from tests.support.resources import sql
from tests.support.service import Person, Service

EQUAL_SECONDS = 10.0
WRITES_SECONDS = 60.0  # the time limit for queued writes and jobs
MAX_WAIT_SECONDS = 1.0
STUCK_SECONDS = 120.0  # must exceed the longest duration of a step
LANES = 3
ENVELOPE_BYTES = 1_000  # upper bound of what a socket message adds to the body of its request
BACKLOG = 8  # The next step is drawn only when no more than this many writes wait in a lane.
# The expected statuses. 503 is missing, because no database is ever down in these tests.
ANSWERS = frozenset({200, 201, 202, 204, 403, 404, 409, 429})
PUBLIC = frozenset({"movies", "characters", "genres", "actors", "comments", "ratings", "jobs"})

T = TypeVar("T")


def _names_no_row(status: int, body: Any) -> bool:
    """Return whether a movie was rejected only because it names genres or actors that do not exist, or are several."""
    allowed = {"unknown_genre", "unknown_actor", "ambiguous"}
    return status == 422 and all(problem["type"] in allowed for problem in body["detail"])


def _now(seconds: float = 0.0) -> str:
    return utc_text(datetime.now(UTC) + timedelta(seconds=seconds))


@dataclass(frozen=True)
class Wish:
    """A subscription that a client wants. `begins` is "snapshot", "list", or "base" (an earlier position)."""

    topics: tuple[str, ...]
    filter: Wanted | None
    latest_every_ms: int | None
    begins: str
    asks_snapshot: bool
    is_named: bool


class World:
    """The workers, writers and watchers. Only `do` may be called from outside the world's event loop."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = services
        self.urls = [service.ws_url for service in services]
        self.problems: list[str] = []
        self.clients: list[Client] = []
        self.base: tuple[Rows, Place] | None = None
        self.quiets = 0
        self._stack = AsyncExitStack()
        self._loop = asyncio.new_event_loop()
        self._people: list[Person] = []
        self._rest = [Rest(service.port) for service in services]
        self._own_sessions: set[str] = set()
        self._known = Known()
        self._lanes: list[asyncio.Queue[Write]] = []
        self._writers: list[asyncio.Task[None]] = []
        self._labels = itertools.count(1)
        self._begun = ""

    # --- start and end

    @contextlib.contextmanager
    def running(self) -> Iterator[World]:
        thread = threading.Thread(target=self._loop.run_forever, name="oracle")
        thread.start()
        try:
            self.do(self._open())
            yield self
        finally:
            try:
                self.do(self._close())
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                thread.join()
                self._loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the world's event loop, from another thread, and return its result."""
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result(timeout=STUCK_SECONDS)
        except TimeoutError:
            if running.done():
                raise
            running.cancel()
            waits = "\n".join(f"{task.get_name()}: {task.get_stack()}" for task in asyncio.all_tasks(self._loop))
            raise AssertionError(f"stuck for {STUCK_SECONDS} s:\n{waits}") from None

    async def _open(self) -> None:
        first = self.services[0]
        self._people = [await self._stack.enter_async_context(first.person(f"user{number}")) for number in range(2)]
        self._people.append(await self._stack.enter_async_context(first.admin()))
        self._known.user_ids = [person.id for person in self._people]
        self._known.names = [person.name for person in self._people]
        self._known.sessions = [[], []]
        for person in self._people:
            rows = await walk(self._rest[0], "/auth/sessions", person, by_id=False)
            self._own_sessions |= {row["id"] for row in rows}
        self._lanes = [asyncio.Queue() for _ in range(LANES)]
        self._writers = [asyncio.create_task(self._write_all(lane)) for lane in self._lanes]

    async def _close(self) -> None:
        for writer in self._writers:
            writer.cancel()
        await asyncio.gather(*self._writers, return_exceptions=True)
        for client in self.clients:
            await client.cut()
        for rest in self._rest:
            await rest.close()
        await self._stack.aclose()

    # --- writing

    async def write(self, lane: int, batch: Batch) -> None:
        """Queue a batch. Return once few writes are waiting, or after MAX_WAIT_SECONDS if paused sockets delay them."""
        queue = self._lanes[lane]
        for write in batch.writes():
            queue.put_nowait(write)
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        while queue.qsize() > BACKLOG and time.monotonic() < deadline:
            self.check()
            await asyncio.sleep(0.005)

    async def _write_all(self, lane: asyncio.Queue[Write]) -> None:
        while True:
            write = await lane.get()
            try:
                await self._write(write)
            except (OSError, EOFError, LookupError, ValueError) as error:
                self.problems.append(f"{write}: {type(error).__name__}: {error}")
            finally:
                lane.task_done()

    async def _write(self, write: Write) -> None:
        wanted = call(write, self._known)
        if wanted is None:
            return
        is_account = wanted.path.startswith("/admin/")
        who = ADMIN if is_account else write.who
        client = next((each for each in self.clients if each.user == who and each.is_open and each.is_reading), None)
        fits = len(json.dumps(wanted.body)) < MAX_BODY_BYTES - ENVELOPE_BYTES
        if write.by_socket and client is not None and fits and not wanted.is_anonymous:
            try:
                status, body = await client.request(wanted.method, wanted.path, wanted.body)
            except ConnectionError:
                return
        else:
            rest = self._rest[write.worker % len(self._rest)]
            token = None if wanted.is_anonymous else self._people[who].token
            answer = await rest.ask(wanted.method, wanted.path, wanted.body, token, wanted.headers)
            status, body = answer.status, answer.body
        if status not in ANSWERS and not _names_no_row(status, body):
            self.problems.append(f"{write} got {status}: {str(body)[:500]}")
        elif status < 300:
            self._learn(write, wanted.path, wanted.body, body)

    def _learn(self, write: Write, path: str, sent: Any, body: Any) -> None:
        known = self._known
        match write.kind:
            case "add":
                known.learn(write.resource, [body])
            case "add_bulk":
                known.learn(write.resource, body.get("added", [body]))
            case "delete":
                known.forget(write.resource, [int(path.rpartition("/")[2])])
            case "delete_bulk" | "delete_range":
                known.forget(write.resource, body["deleted"])
            case "keep":
                known.entries[write.who].append(body["id"])
            case "generate":
                known.jobs.append(body["id"])
            case "register":
                known.spares.append(body["id"])

    # --- watching

    def _names(self) -> dict[str, Any]:
        """Return the current values of the placeholders in filters."""
        known = self._known
        movies = sorted(known.owners["movies"]) or [1]
        found: dict[str, Any] = {f"movie{number}": movies[-min(number + 1, len(movies))] for number in range(3)}
        found |= {"user0": known.user_ids[0], "user1": known.user_ids[1], "admin": known.user_ids[ADMIN]}
        found |= {"middle": movies[len(movies) // 2], "begin": self._begun, "lately": _now(), "later": _now(+1.0)}
        return found

    async def connect(self, worker: int, user: int | None, topics: Sequence[str] = ()) -> Client:
        """Connect a client. With `topics`, the client uses the default subscription, from the base position."""
        token = self._people[user].token if user is not None else None
        client = Client(f"client {next(self._labels)}", self.urls, self.problems, token, user)
        if topics:
            client.handshake = Watched(View(topics, None, None))
            self._begin_at_base(client.handshake.view)
        self.clients.append(client)
        await client.connect(worker)
        return client

    async def subscribe(self, client: Client, wish: Wish) -> None:
        view = View(wish.topics, resolved(wish.filter, self._names()), wish.latest_every_ms)
        if wish.begins == "base" and set(wish.topics) <= PUBLIC:
            self._begin_at_base(view)
        elif wish.begins == "list" and len(wish.topics) == 1 and wish.topics[0] in CATALOG:
            await self._begin_at_list(view)
        name = f"view-{next(self._labels)}" if wish.is_named else None
        watched = Watched(view, name, wish.asks_snapshot)
        client.watched.append(watched)
        await client.subscribe(watched)

    async def subscribe_again(self, client: Client, number: int, *, is_bad: bool) -> None:
        """Unsubscribe, and subscribe again from the same position or, with `is_bad`, from an invalid one."""
        if client.watched:
            watched = client.watched[number % len(client.watched)]
            watched.is_bad = is_bad
            await client.unsubscribe(watched, comes_back=True)

    async def give_up(self, client: Client, number: int) -> None:
        if len(client.watched) > 1:
            await client.unsubscribe(client.watched[number % len(client.watched)], comes_back=False)

    async def leave(self, client: Client) -> None:
        """Disconnect and remove a client."""
        await client.cut()
        self.clients.remove(client)

    def _begin_at_base(self, view: View) -> None:
        assert self.base is not None
        rows, place = self.base
        chosen = {
            topic: {id_: row for id_, row in rows[topic].items() if matches(view.wanted, row)} for topic in view.topics
        }
        view.begin_with(chosen, place)

    async def _begin_at_list(self, view: View) -> None:
        """Start a view from a REST list and its `Stream-Position`, if the list fits on one page."""
        (topic,) = view.topics
        parameters = [*query(view.wanted), ("limit", str(PAGE))]
        answer = await self._rest[0].ask("GET", f"/{topic}?{urlencode(parameters)}")
        assert answer.status == 200, answer
        rows = answer.body
        if len(rows) < PAGE and "stream-position" in answer.headers:
            epoch, _, seq = answer.headers["stream-position"].rpartition(":")
            view.begin_with({topic: {row["id"]: row for row in rows}}, Place(epoch, int(seq)))

    # --- the truth

    async def fresh(self, seed: int) -> None:
        """Start over: without watchers, and with only a few new rows of both users."""
        for client in self.clients:
            await client.cut()
        self.clients.clear()
        self.problems.clear()
        await self._writes_done()
        self.problems.clear()
        admin = self._people[ADMIN]
        for resource in CATALOG:
            ids = [row["id"] for row in await walk(self._rest[0], f"/{resource}", admin)]
            for start in range(0, len(ids), PAGE):
                some = {"ids": ids[start : start + PAGE]}
                answer = await self._rest[0].ask("DELETE", f"/{resource}/bulk", some, admin.token)
                assert answer.status == 200, answer
            self._known.owners[resource].clear()
        self.problems.clear()
        self._begun = _now()
        genres = [{"name": name} for name in GENRES]
        answer = await self._rest[0].ask("POST", "/genres/bulk", genres, admin.token)
        assert answer.status == 201, answer
        for number, resource in itertools.product(range(2), CATALOG):
            await self._write(Write("add_bulk", resource, 30, seed, number, number, by_socket=False))
        await self._keep_base()

    async def _keep_base(self) -> None:
        """Store all rows and their position in the log, for subscriptions that begin at an earlier position.

        Nothing may be written during this call.
        """
        [(epoch, seq)] = await sql(self.services[0], "SELECT epoch, seq FROM event_head")
        self.base = (await self._truth()).rows, Place(epoch, seq)

    async def _writes_done(self) -> None:
        deadline = time.monotonic() + WRITES_SECONDS
        joining = asyncio.gather(*(lane.join() for lane in self._lanes))
        try:
            while not joining.done() or await self._unfinished_jobs():
                self.check()
                if time.monotonic() > deadline:
                    raise AssertionError(f"writes and jobs did not end within {WRITES_SECONDS} s")
                await asyncio.sleep(0.01)
        finally:
            joining.cancel()

    async def _unfinished_jobs(self) -> bool:
        answers = [await self._rest[0].ask("GET", f"/jobs?state={state}&limit=1") for state in ("queued", "running")]
        return any(answer.body for answer in answers)

    async def _truth(self) -> Truth:
        truth = Truth(self._rest[self.quiets % len(self._rest)], self._people)
        await truth.read()
        return truth

    # --- quiet points

    async def quiet(self) -> None:
        """Wait for all writes and jobs, and compare every view with the truth; write once more, and compare again."""
        self.quiets += 1
        for client in self.clients:
            client.go_on()
            if not client.is_open:
                await client.connect(self.quiets)
        await self._writes_done()
        await self._all_are_right()
        for write in self._markers():
            await self._write(write)
        truth = await self._all_are_right()
        # Any superfluous event arrives before the reply to this ping.
        await asyncio.gather(*(client.ping() for client in self.clients), return_exceptions=True)
        await self._all_are_right(truth)

    def _markers(self) -> Sequence[Write]:
        kinds = ("patch_bulk", "add_bulk", "add", "delete", "patch", "delete_bulk")
        return [
            Write(kind, resource, 4, self.quiets * 100 + number, ADMIN, number, by_socket=False)
            for number, (kind, resource) in enumerate(itertools.product(kinds, CATALOG))
        ]

    async def _all_are_right(self, truth: Truth | None = None) -> Truth:
        """Wait until all views equal the truth, and return the truth. Read the truth first unless it is given."""
        if truth is None:
            truth = await self._truth()
            self._remember(truth.rows)
        waiting = [
            (client, view, await truth.rows_for(view, client.user)) for client in self.clients for view in client.views
        ]
        deadline = time.monotonic() + EQUAL_SECONDS
        while True:
            self.check()
            for client in self.clients:
                if not client.is_open:  # the service closed the socket as too slow
                    await client.connect(self.quiets)
            waiting = [each for each in waiting if each[1].difference(each[2]) is not None]
            if not waiting:
                return truth
            if time.monotonic() > deadline:
                client, view, wanted = waiting[0]
                frames = "\n  ".join(view.told)
                raise AssertionError(
                    f"{len(waiting)} views are wrong after {EQUAL_SECONDS} s of quiet; the first is {client.label}'s\n"
                    f"{view}: {view.difference(wanted)}\n  {frames}"
                )
            await asyncio.sleep(0.01)

    def _remember(self, truth: Rows) -> None:
        for resource in CATALOG:
            self._known.owners[resource] = {id_: row.get("user_id") for id_, row in truth[resource].items()}
        self._known.sessions = [list(truth[f"sessions of {user}"].keys() - self._own_sessions) for user in range(2)]

    async def pause_or_go_on(self, client: Client) -> None:
        if client.is_reading:
            client.pause()
        else:
            client.go_on()

    def check(self) -> None:
        for writer in self._writers:
            if writer.done():
                writer.result()
        if self.problems:
            raise AssertionError("\n".join(self.problems))
