"""The REST API over a socket: the same responses as over HTTP, concurrent requests, and the socket's identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from realtime.sockets.rest_calls import MAX_UNREAD_REPLIES
from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import database_of
from tests.support.service import Service, eventually
from tests.support.sockets import request, signed_in

pytestmark = SQLITE_ONLY  # socket and HTTP requests share their code; `tests/catalog` tests it on both databases


async def test_a_write_over_the_socket_gets_a_reply_and_an_event(service: Service) -> None:
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        body = {"title": "The Third Man"}
        await watcher.send({"id": 1, "action": "request", "method": "POST", "path": "/movies", "body": body})
        frames = [await watcher.next(), await watcher.next()]
        [reply] = [frame for frame in frames if "reply_to" in frame]
        [event] = [frame for frame in frames if "operation" in frame]
        assert (reply["reply_to"], reply["status"]) == (1, 201)
        assert reply["headers"]["location"] == f"/movies/{reply['body']['id']}"
        assert event["data"] == reply["body"]
        assert event["actor_id"] == alice.id


@pytest.mark.parametrize(
    ("method", "path", "members"),
    [
        ("GET", "/movies?limit=2&sort=-id", {}), ("GET", "/api/v1/movies/count/", {}), ("HEAD", "/movies", {}),
        ("GET", "/movies?limit=2&sort=-rating&sort=-id", {}), ("GET", "/movies?planet=mars", {}),
        ("GET", "/movies/username/%E2%82%AC%2525", {}), ("GET", "/nowhere", {}),
        ("GET", "/movies/999999999", {}), ("DELETE", "/movies/999999999", {}), ("GET", "/ws", {}),
        ("POST", "/movies", {}), ("POST", "/movies", {"body": None}), ("POST", "/movies", {"body": {"titel": 1}}),
        ("POST", "/movies", {"body": "text", "headers": {"Content-Type": "text/plain"}}),
        ("PUT", "/movies", {"body": {}}), ("GET", "/users/nonAdmin", {}), ("GET", "/auth/me", {}),
        ("GET", "/healthz", {"headers": {"X-Request-ID": "mine"}}),
    ],
)  # fmt: skip
async def test_a_reply_is_that_of_http(service: Service, method: str, path: str, members: dict[str, Any]) -> None:
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        reply = await request(watcher, method, path, **members)
        headers = {"Content-Type": "application/json", **members.get("headers", {})}
        content = json.dumps(members["body"]) if "body" in members else None
        answer = await alice.http.request(method, path, content=content, headers=headers)
        assert reply["status"] == answer.status_code
        assert reply["body"] == (answer.json() if answer.content else None)
        varying = {"content-length", "date", "x-request-id", "stream-position", "server"}
        varying.add("x-content-type-options")  # this header only concerns browsers that load an HTTP response
        varying |= {"content-encoding", "vary"}  # replies on a socket are never compressed
        assert {k: v for k, v in reply["headers"].items() if k not in varying} == {
            k: v for k, v in answer.headers.items() if k not in varying
        }
        assert reply["headers"]["x-request-id"] == headers.get("X-Request-ID", reply["headers"]["x-request-id"])


async def test_conditions_and_idempotency_keys_work(service: Service) -> None:
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        headers = {"Idempotency-Key": f"key-{alice.id}"}
        first = await request(watcher, "POST", "/movies", headers=headers, body={"title": "once"})
        over_http = await alice.http.post("/movies", headers=headers, json={"title": "once"})
        assert (over_http.status_code, over_http.json()) == (201, first["body"])
        again = await request(watcher, "POST", "/movies", headers=headers, body={"title": "once"})
        assert (again["status"], again["body"]) == (201, first["body"])
        assert again["headers"]["idempotency-replayed"] == "true"
        assert "idempotency-replayed" not in first["headers"]
        path = f"/movies/{first['body']['id']}"
        unchanged = await request(watcher, "GET", path, headers={"If-None-Match": first["headers"]["etag"]})
        assert (unchanged["status"], unchanged["body"]) == (304, None)
        stale = await request(watcher, "PATCH", path, headers={"If-Match": '"9-0000000000000000"'}, body={"rating": 1})
        assert stale["status"] == 412


async def test_an_anonymous_socket_may_read_and_not_write(service: Service) -> None:
    async with service.watch() as watcher:
        assert (await request(watcher, "GET", "/movies?limit=1"))["status"] == 200
        reply = await request(watcher, "POST", "/movies", body={"title": "mine"})
        assert (reply["status"], reply["headers"]["www-authenticate"]) == (401, "Bearer")


async def test_a_request_has_the_rights_of_the_sockets_user(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.watch(**signed_in(bob)) as watcher:
        movie = await alice.add()
        reply = await request(watcher, "PATCH", f"/movies/{movie['id']}", body={"rating": 1})
        assert reply["status"] == 403
        refused = await request(watcher, "PATCH", f"/movies/{movie['id']}", headers=alice.bearer)
        assert refused["error"]["code"] == "invalid_message"


async def test_more_requests_at_once_than_allowed_are_refused(new_service: Callable[..., Service]) -> None:
    """Checking a password is slow, so the seventeenth request arrives while sixteen are waiting."""
    service = new_service(PASSWORD_MEMORY_KIB="65536", PASSWORD_TIME_COST="3").start()
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        await watcher.ask({"id": 0, "action": "subscribe", "topics": ["characters"]})
        body = {"username": alice.name, "password": "not the password"}
        for number in range(1, 41):
            members = {"method": "POST", "path": "/auth/login", "body": body}
            await watcher.send({"id": number, "action": "request", **members})
        replies = [await watcher.until(lambda frame: "reply_to" in frame) for _ in range(40)]
        assert {reply["reply_to"] for reply in replies} == set(range(1, 41))
        done = [reply for reply in replies if reply.get("status") == 401]
        refused = [reply for reply in replies if "ok" in reply]
        assert len(done) >= 16
        assert refused
        assert len(done) + len(refused) == 40
        assert {reply["error"]["code"] for reply in refused} == {"too_many_requests"}


async def test_a_reply_that_is_too_large_is_an_error(service: Service) -> None:
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        await watcher.ask({"id": 0, "action": "subscribe", "topics": ["characters"]})
        await alice.add_bulk([{"title": "x", "description": "y" * 9_000}] * 120)
        reply = await request(watcher, "GET", f"/movies?limit=1000&user_id={alice.id}")
        assert (reply["status"], reply["body"], reply["error"]["code"]) == (200, None, "reply_too_large")
        assert reply["headers"]["x-total-count"] == "120"
        reply = await request(watcher, "GET", f"/movies?limit=50&user_id={alice.id}")
        assert len(reply["body"]) == 50


async def test_a_page_comes_as_text(service: Service) -> None:
    async with service.watch() as watcher:
        page = await request(watcher, "GET", "/docs")
        assert "<html" in page["body"]


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"method": "GET", "path": "/movies", "headers": {"Host": "elsewhere"}},
        {"method": "POST", "path": "/movies", "body": json.loads("[" * 300 + "]" * 300)},
    ],
)
async def test_an_invalid_request_is_refused(service: Service, members: dict[str, Any]) -> None:
    """Other kinds of invalid messages are tested in `test_asyncapi`."""
    async with service.watch() as watcher:
        reply = await watcher.ask({"id": 1, "action": "request", **members})
        assert (reply["ok"], reply["error"]["code"]) == (False, "invalid_message")


async def test_writes_that_have_begun_are_finished_when_their_socket_closes(service: Service) -> None:
    async with service.person() as alice, database_of(service) as database:
        # While another transaction holds the lock that every write takes, the calls begin but cannot end.
        async with database.begin() as (connection, transaction):
            await connection.execute(text("UPDATE event_head SET seq = seq"))
            async with service.watch(**signed_in(alice)) as watcher:
                for number in range(MAX_UNREAD_REPLIES):
                    members = {"method": "POST", "path": "/movies", "body": {"title": f"left behind {number}"}}
                    await watcher.send({"id": number, "action": "request", **members})
                assert (await watcher.ask({"id": "later", "action": "ping"}))["ok"]
                watcher.socket.transport.abort()
            await transaction.rollback()

        async def all_stored() -> bool:
            titles = (await alice.http.get(f"/movies/names?user_id={alice.id}")).json()
            return sorted(titles) == [f"left behind {number}" for number in range(MAX_UNREAD_REPLIES)]

        await eventually(all_stored, "the writes are finished")
