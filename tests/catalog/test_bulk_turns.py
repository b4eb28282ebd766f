"""Bulk operations wait for their turn, and large bodies for a place, so that one user does not delay all others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from core.errors import TooManyRequests
from core.network.turns import Turns
from core.stopping import Stopping
from services import bulk
from services.bulk import MAX_LARGE_BODIES, MAX_LARGE_BODIES_PER_ADDRESS, MAX_LARGE_BODIES_PER_USER, BulkOperations
from services.limits.in_progress import Uploader
from tests.support.metrics import metrics_of
from tests.support.raw_http import raw_connection
from tests.support.requests import assert_problem, ok, over_socket, sign_in
from tests.support.served_here import served_here
from tests.support.service import Person, Service, eventually
from tests.support.sockets import signed_in

PATH = "/movies/bulk"
ROWS = [{"title": "The Third Man"}]
LARGE = [{"title": "The Third Man", "description": "x" * 1_000}] * 300

REFUSED_TURN = ("marquee_bulk_refused_total", (("reason", "turn"),))
REFUSED_BODY = ("marquee_bulk_refused_total", (("reason", "body"),))

NewService = Callable[..., Service]


@asynccontextmanager
async def limited(new_service: NewService) -> AsyncIterator[tuple[Service, BulkOperations]]:
    """A service with limits per client, in this process, and its bulk operations."""
    service = new_service(RATE_LIMITS="on")
    async with served_here(service) as server:
        yield service, server.lifespan.state["services"].bulk


def head(person: Person, *more: str) -> str:
    lines = [f"POST {PATH} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {person.token}"]
    return "\r\n".join([*lines, "Content-Type: application/json", *more, "", ""])


async def test_a_user_runs_one_bulk_operation_at_a_time(new_service: NewService) -> None:
    async with limited(new_service) as (service, operations), service.person() as alice, service.person() as bob:
        async with operations.turn(alice.id, Stopping()):
            adding = asyncio.create_task(alice.http.post(PATH, json=ROWS))
            deleting = asyncio.create_task(alice.http.delete(f"{PATH}/1000/1001"))
            await eventually(lambda: operations.turns.waiting == 2, "both bulk operations wait")
            async with raw_connection(service, head(alice, "Content-Length: 2") + "[]"):
                await eventually(lambda: operations.turns.waiting == 3, "a third one waits")
            await eventually(lambda: operations.turns.waiting == 2, "its client has disconnected")
            await alice.add()
            assert (await sign_in(bob.http, alice.name)).status_code == 200
            await bob.add_bulk(ROWS)
            assert not adding.done()
            assert not deleting.done()
        assert (await adding).status_code == 201
        assert (await deleting).status_code == 200
        await alice.add_bulk(ROWS)


async def test_a_bulk_operation_that_waits_too_long_is_rejected(
    new_service: NewService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "WAIT_SECONDS", 0.1)
    async with limited(new_service) as (service, operations), service.person() as alice:
        before = await metrics_of(service)
        async with operations.turn(alice.id, Stopping()), service.watch(**signed_in(alice)) as watcher:
            rejected = await alice.http.post(PATH, json=ROWS)
            assert_problem(rejected, 503)
            assert rejected.headers["retry-after"] == "1"
            reply = await over_socket(watcher, "POST", PATH, ROWS)
            assert reply["status"] == 503
            assert operations.turns.waiting == 0
        after = await metrics_of(service)
        waited = ("marquee_bulk_wait_seconds_sum", ())
        assert 0.2 <= after[waited] - before[waited] < 10
        for sample, refused in (REFUSED_TURN, 2), (("marquee_bulk_wait_seconds_count", ()), 3):
            assert after[sample] - before[sample] == refused
        assert await ok(alice.http.get(f"/movies/count?user_id={alice.id}")) == {"count": 0}
        await alice.add_bulk(ROWS)


async def test_a_user_sends_few_large_bodies_at_a_time(new_service: NewService) -> None:
    async with limited(new_service) as (service, operations), service.person() as alice, service.person() as bob:
        bodies = operations.large_bodies
        async with AsyncExitStack() as slow:
            for _ in range(MAX_LARGE_BODIES_PER_USER):
                await slow.enter_async_context(raw_connection(service, head(alice, "Content-Length: 10000000")))
            await eventually(lambda: bodies.total == MAX_LARGE_BODIES_PER_USER, "the bodies are counted")
            before = (await metrics_of(service))[REFUSED_BODY]
            rejected = await alice.http.post(PATH, json=LARGE)
            assert_problem(rejected, 429)
            assert int(rejected.headers["retry-after"]) >= 1
            assert (await metrics_of(service))[REFUSED_BODY] == before + 1
            chunk = b"%x\r\n%s\r\n" % (300_000, b" " * 300_000)
            async with raw_connection(service, head(alice, "Transfer-Encoding: chunked").encode() + chunk) as chunked:
                assert " 429 " in await chunked.head(), "rejected before the body is complete"
            await alice.add_bulk(ROWS)
            await bob.add_bulk(LARGE)
        await eventually(lambda: bodies.total == 0, "the interrupted bodies no longer count")
        await alice.add_bulk(LARGE)


@pytest.mark.parametrize(
    ("limits_clients", "users", "maximum"),
    [(True, [1], MAX_LARGE_BODIES_PER_USER), (True, range(99), MAX_LARGE_BODIES_PER_ADDRESS), (False, [1], 16)],
)
def test_large_bodies_are_bounded(limits_clients: bool, users: Any, maximum: int) -> None:
    operations = BulkOperations(limits_clients=limits_clients)
    with ExitStack() as stack:
        for number in range(maximum):
            stack.enter_context(operations.receiving(Uploader(users[number % len(users)], "127.0.0.2")))
        with pytest.raises(TooManyRequests), operations.receiving(Uploader(users[maximum % len(users)], "127.0.0.2")):
            pass
    assert MAX_LARGE_BODIES == 16


async def test_without_limits_per_client_a_user_may_have_all_turns() -> None:
    turns = BulkOperations(limits_clients=False).turns
    async with turns.of(1), turns.of(1):
        with suppress(TimeoutError):
            async with asyncio.timeout(0), turns.of(1):
                raise AssertionError("expected no third turn")
    assert turns.waiting == 0


async def test_clients_take_turns() -> None:
    turns = Turns(total=2, per_client=1)
    order: list[str] = []
    tasks: list[asyncio.Task[None]] = []
    ends: dict[str, asyncio.Event] = {}

    async def come(client: int, name: str) -> None:
        async def work() -> None:
            async with turns.of(client):
                order.append(name)
                await ends[name].wait()

        ends[name] = asyncio.Event()
        tasks.append(asyncio.create_task(work(), name=name))
        await asyncio.sleep(0)  # the task has its turn now, or waits

    async def end(name: str) -> None:
        """End the task, and let the next one begin."""
        ends[name].set()
        await asyncio.gather(*(task for task in tasks if task.get_name() == name))
        await asyncio.sleep(0)

    for name in ("alice 1", "alice 2", "alice 3", "bob 1", "bob 2", "carol 1"):
        await come({"alice": 1, "bob": 2, "carol": 3}[name.split()[0]], name)
    assert order == ["alice 1", "bob 1"]
    tasks[4].cancel()  # bob 2
    await end("alice 1")
    assert order == ["alice 1", "bob 1", "carol 1"], "Alice has had a turn more recently than Carol"
    await end("bob 1")
    await end("carol 1")
    assert order[3:] == ["alice 2"], "Alice runs one at a time"
    await end("alice 2")
    await end("alice 3")
    assert order == ["alice 1", "bob 1", "carol 1", "alice 2", "alice 3"]
    assert turns.waiting == 0
