"""The identity of a live socket when its token is refreshed, expires or is revoked, on any worker."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from core.errors import CloseCode
from repository.engine import event_log
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import change_group, ok, sign_in
from tests.support.resources import MOVIES, derived
from tests.support.service import Person, Service, eventually
from tests.support.sockets import REVOKED_SECONDS, closing, rows_of, signed_in, subscribed


@pytest.fixture(scope="module")
def workers(
    new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Service]]:
    """Two processes on one database. With SQLite, there is no bus between them."""
    places = new_places()
    folders = [tmp_path_factory.mktemp("worker") for _ in range(2)]
    here, there = (Service(places.database_url, places.broadcast_url, folder) for folder in folders)
    with here.running(), there.running():
        yield here, there


async def test_logout_closes_the_sockets_of_the_session_on_every_worker(workers: tuple[Service, Service]) -> None:
    here, there = workers
    async with here.person() as alice, here.person() as bob:
        second = await there_too(there, alice)
        async with (
            here.watch(**signed_in(alice)) as local,
            there.watch(**signed_in(alice)) as remote,
            there.watch(**signed_in(second)) as other_session,
            there.watch(**signed_in(bob)) as other_user,
        ):
            assert (await alice.http.post("/auth/logout")).status_code == 204
            for watcher in (local, remote):
                assert (await closing(watcher, REVOKED_SECONDS))[0] == CloseCode.TOKEN_EXPIRED
            for watcher in (other_session, other_user):
                assert (await watcher.ask({"id": 1, "action": "ping"}))["ok"]


async def there_too(service: Service, person: Person) -> Person:
    """Sign in as the same user at this service, in another session."""
    async with service.anyone() as client:
        return Person(client, person.id, person.name, (await ok(sign_in(client, person.name)))["access_token"])


async def test_a_deactivated_account_loses_its_sockets_at_once(workers: tuple[Service, Service]) -> None:
    here, there = workers
    async with here.person() as alice, here.admin() as admin, there.watch(**signed_in(alice)) as remote:
        assert (await admin.http.post(f"/admin/users/{alice.id}/deactivate")).status_code == 200
        assert (await closing(remote, REVOKED_SECONDS))[0] == CloseCode.TOKEN_EXPIRED


async def test_a_group_change_closes_only_sockets_that_lost_a_right(workers: tuple[Service, Service]) -> None:
    here, there = workers
    async with here.person() as alice, here.admin() as admin:
        await change_group(admin, alice, "admin")
        async with there.watch(**signed_in(alice)) as users, there.watch(**signed_in(alice)) as movies:
            await subscribed(users, topics=["users"])
            await subscribed(movies, topics=["movies"])
            await change_group(admin, alice, "moderator")
            assert (await closing(users, REVOKED_SECONDS))[0] == CloseCode.TOKEN_EXPIRED
            reply = await movies.ask({"id": 1, "action": "subscribe", "topics": ["users"]})
            assert reply["error"]["code"] == "forbidden"
            movie = await alice.add()
            assert (await movies.expect("add"))["data"] == movie
            await change_group(admin, alice, "admin")

            async def is_admin() -> bool:
                reply = await movies.ask({"id": 2, "action": "subscribe", "topics": ["users"]})
                return bool(reply["ok"])

            await eventually(is_admin, "the socket has the rights of the new group", 5)


async def test_a_socket_with_a_refreshed_token_outlives_the_first_token(service: Service) -> None:
    async with service.person() as alice:
        short = alice.forged(exp=int(time.time()) + 2)
        options = signed_in(dataclasses.replace(alice, token=short))
        async with service.watch(**options) as refreshed, service.watch(**options) as expired:
            reply = await refreshed.ask({"id": 1, "action": "auth", "token": alice.token})
            assert reply["data"] == {"user_id": alice.id, "group": "user"}
            assert (await closing(expired))[0] == CloseCode.TOKEN_EXPIRED
            movie = await alice.add()
            assert (await refreshed.expect("add"))["data"] == movie


async def test_a_request_after_the_end_of_the_session_is_rejected(workers: tuple[Service, Service]) -> None:
    """Whether the close or the request comes first, nothing is written in the name of the signed-out user."""
    here, there = workers
    async with here.person() as alice, here.person() as bob, there.watch(**signed_in(alice)) as remote:
        await alice.http.post("/auth/logout")
        body = {"title": "written after the logout"}
        try:
            await remote.send({"id": 1, "action": "request", "method": "POST", "path": "/movies", "body": body})
            reply = await remote.until(lambda frame: "reply_to" in frame)
            assert reply["status"] == 401
        except ConnectionClosed:
            assert remote.socket.close_code == CloseCode.TOKEN_EXPIRED
        assert (await bob.http.get(f"/movies/count?user_id={alice.id}")).json() == {"count": 0}


async def test_a_session_is_private_in_snapshot_event_and_replay(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        async with service.watch(**signed_in(alice)) as hers, service.watch(**signed_in(bob)) as his:
            for watcher in (hers, his):
                await subscribed(watcher, topics=["sessions"], snapshot=True, **{"as": "mine"})
            assert {row["user_id"] for row in await rows_of(hers, "sessions")} == {alice.id}
            assert {row["user_id"] for row in await rows_of(his, "sessions")} == {bob.id}
            await there_too(service, bob)
            event = await his.expect("add", "sessions")
            assert event["data"]["user_id"] == bob.id
            await there_too(service, alice)
            assert (await hers.expect("add", "sessions"))["data"]["user_id"] == alice.id
        async with service.watch(**signed_in(alice)) as again:
            await subscribed(again, topics=["sessions"], since=await service.position(0))
            await there_too(service, alice)
            last = await again.until(lambda frame: frame.get("operation") == "add" and len(again.events) >= 3)
            assert last["data"]["user_id"] == alice.id
            assert {event["data"].get("user_id", alice.id) for event in again.events} == {alice.id}


async def test_no_subscription_reveals_events_of_another_audience(service: Service) -> None:
    """Write events for every audience, and read them in every way as each of several users."""
    dice = random.Random(20_260)
    async with service.person() as alice, service.person() as bob, service.admin() as admin:
        people: dict[str, Person | None] = {"alice": alice, "bob": bob, "admin": admin, "anonymous": None}
        allowed = {
            "alice": {"public", f"user:{alice.id}", "group:user"},
            "bob": {"public", f"user:{bob.id}", "group:user"},
            "admin": {"public", f"user:{admin.id}", "group:admin"},
            "anonymous": {"public"},
        }
        audiences = sorted(set().union(*allowed.values()) | {"group:moderator", "user:0"})
        database = Database(service.database_url)
        start = await event_log.head(database)

        async def emit(number: int) -> None:
            audience, operation = dice.choice(audiences), dice.choice(["add", "update", "delete"])
            row = movie_row(number, audience)
            before = None if operation == "add" else row
            changed = ["title"] if operation == "update" else []

            async def work(tx: Transaction) -> None:
                tx.emit("movies", operation, row, actor_id=None, before=before, changed=changed, audience=audience)

            await database.write(work)

        async def watch(name: str, seen: list[dict[str, Any]], ready: asyncio.Event) -> None:
            person = people[name]
            options = signed_in(person) if person is not None else {}
            async with service.watch(**options) as watcher:
                how: dict[str, Any] = {"topics": ["movies"]}
                if dice.random() < 0.5:
                    either = {"or": [{"user_id": 0}, {"title": {"prefix": "P"}}]}
                    how["filter"] = dice.choice([{"id": {"gt": 0}}, either])
                if dice.random() < 0.3:
                    how["deliver"] = {"latest_every_ms": 50}
                if dice.random() < 0.5:
                    how |= {"since": start.seq, "epoch": start.epoch}
                await subscribed(watcher, **how)
                ready.set()
                while not seen or "P public the end" not in titles(seen[-1:]):
                    seen.append(await watcher.next())

        seen: dict[str, list[dict[str, Any]]] = {}
        waiting, watching = [], []
        for number in range(24):
            name = dice.choice(sorted(people))
            key = f"{name}/{number}"
            seen[key] = []
            ready = asyncio.Event()
            waiting.append(ready)
            watching.append(asyncio.create_task(watch(name, seen[key], ready)))
        await asyncio.gather(*(ready.wait() for ready in waiting))
        for number in range(1, 120):
            await emit(number)
        movie = movie_row(2**40, "public the end")

        async def end(tx: Transaction) -> None:
            tx.emit("movies", "add", movie, actor_id=None)

        await database.write(end)
        await asyncio.gather(*watching)
        for key, frames in seen.items():
            name = key.partition("/")[0]
            found = titles(frames)
            assert found, "expected the watcher to see events"
            leaked = {title for title in found if title.split(" ")[1] not in allowed[name]}
            assert not leaked, (key, leaked)
        for name, person in people.items():
            async with service.anyone() as client:
                if person is not None:
                    client.headers["Authorization"] = f"Bearer {person.token}"
                seq = start.seq
                pages: list[dict[str, Any]] = []
                while True:
                    after = f"{start.epoch}:{seq}"
                    page = (await client.get(f"/events?after={after}&topics=movies&limit=50")).json()
                    if not page["data"] and page["seq"] == seq:
                        break
                    pages += page["data"]
                    seq = page["seq"]
                assert not {title for title in titles(pages) if title.split(" ")[1] not in allowed[name]}
        await database.close()


def titles(frames: list[dict[str, Any]]) -> set[str]:
    found = set()
    for frame in frames:
        data = frame.get("data", {})
        rows = data.get("items", [data])
        found |= {one["title"] for one in rows if one.get("title", "").startswith("P ")}
    return found


def movie_row(number: int, audience: str) -> dict[str, Any]:
    moment = "2026-01-01T00:00:00.000000Z"
    fields = {"id": number, "title": f"P {audience}", "user_id": 0, "characters_count": 0, "version": 1}
    return {**MOVIES.defaults, **derived(MOVIES), **fields, "created_at": moment, "updated_at": moment}


async def test_a_watcher_that_signs_in_receives_private_events_from_then_on(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await subscribed(watcher, topics=["movies"])
        assert (await watcher.ask({"id": 1, "action": "auth", "token": alice.token}))["ok"]
        database = Database(service.database_url)

        async def work(tx: Transaction) -> None:
            tx.emit("movies", "add", movie_row(1, "hers"), actor_id=None, audience=f"user:{alice.id}")

        await database.write(work)
        await database.close()
        assert (await watcher.expect("add"))["data"]["title"] == "P hers"


async def test_losing_the_right_to_follow_presence_closes_the_socket(service: Service) -> None:
    async with service.person() as alice, service.admin() as admin:
        await change_group(admin, alice, "admin")
        async with service.watch(**signed_in(alice)) as hers:
            await subscribed(hers, topics=["characters"])
            assert (await hers.ask({"id": 1, "action": "presence", "topics": ["users", "movies"]}))["ok"]
            await change_group(admin, alice, "user")
            assert (await closing(hers))[0] == CloseCode.TOKEN_EXPIRED


async def test_messages_after_the_end_of_a_connection_are_ignored(service: Service) -> None:
    """A binary frame ends the connection, and requests that follow it are not carried out."""
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        write = {"id": 1, "action": "request", "method": "POST", "path": "/movies", "body": {"title": "too late"}}
        sent = [watcher.socket.send(b"binary"), *(watcher.send(write) for _ in range(5))]
        await asyncio.gather(*sent, return_exceptions=True)
        assert (await closing(watcher))[0] == CloseCode.PROTOCOL_ERROR
        assert (await alice.http.get(f"/movies/count?user_id={alice.id}")).json() == {"count": 0}


@SQLITE_ONLY
async def test_with_required_authentication_a_forbidden_topic_is_rejected(new_service: Callable[..., Service]) -> None:
    service = new_service(WEBSOCKET_AUTH="required").start()
    async with service.person() as alice, service.watch("topics=users") as watcher:
        reply = await watcher.ask({"id": 1, "action": "auth", "token": alice.token})
        assert (reply["ok"], reply["error"]["code"]) == (False, "forbidden")
        assert (await closing(watcher))[0] == CloseCode.FORBIDDEN
