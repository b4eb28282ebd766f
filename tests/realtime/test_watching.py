"""The websocket as a client sees it: handshake, resume, credentials, and the close of sockets that misbehave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.frames import Frame, Opcode

from core.errors import CloseCode
from realtime.wire.frames import Frames
from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import lose_newest
from tests.support.resources import watching
from tests.support.service import Service, eventually
from tests.support.sockets import closing, refusal, signed_in


async def test_the_welcome_says_where_the_stream_begins(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        welcome = watcher.welcome["data"]
        assert set(welcome) == {"protocol", "epoch", "seq", "user_id", "heartbeat_seconds"}
        assert (welcome["protocol"], welcome["user_id"], welcome["heartbeat_seconds"]) == (1, None, 20)
        for number in range(3):
            await alice.add(title=f"movie {number}")
            await watcher.expect("add", "movies")
        assert watcher.seqs == [welcome["seq"] + 1, welcome["seq"] + 2, welcome["seq"] + 3]


async def test_a_client_that_writes_and_then_connects_begins_after_the_write(service: Service) -> None:
    async with service.person() as alice:
        for number in range(20):
            await alice.add(title=f"before {number}")
            async with service.watch() as watcher:
                event = await watcher.sees(await alice.add(title=f"after {number}"))
                assert event["seq"] == watcher.welcome["data"]["seq"] + 1


@pytest.mark.parametrize("path", ["/ws", "/ws/", "/api/v1/ws", "/api/v1/ws/"])
@SQLITE_ONLY
async def test_the_socket_is_open_at_both_paths(service: Service, path: str) -> None:
    async with connect(service.ws_url.removesuffix("/ws") + path) as socket:
        assert json.loads(await socket.recv())["operation"] == "welcome"


async def test_topics_choose_what_is_seen(service: Service) -> None:
    async with service.person() as alice, watching(service, "topics=characters") as watcher:
        await alice.add("movies")
        await alice.add("characters")
        event = await watcher.next()
        assert (event["topic"], event["operation"]) == ("characters", "add")
        assert event["seq"] == watcher.welcome["data"]["seq"] + 2


async def test_a_summary_stands_for_the_items_of_a_bulk_event(service: Service) -> None:
    async with service.person() as alice, service.watch("bulk=summary") as watcher:
        ids = [movie["id"] for movie in await alice.add_bulk([{"title": f"m{n}"} for n in range(5)])]
        event = await watcher.expect("add_bulk", "movies")
        assert event["data"] == {"count": 5, "first_id": ids[0], "last_id": ids[-1], "job_id": None}
        await alice.delete_bulk(ids)
        assert (await watcher.expect("delete_bulk", "movies"))["data"] == event["data"]
        await watcher.sees(await alice.add())


async def test_a_watcher_resumes_where_it_was(service: Service) -> None:
    async with service.person() as alice:
        async with service.watch() as watcher:
            await alice.add(title="seen")
            seen = await watcher.expect("add")
        missed = [await alice.add(title=f"missed {number}") for number in range(20)]
        epoch = watcher.welcome["data"]["epoch"]
        async with service.watch(f"since={seen['seq']}&epoch={epoch}") as again:
            assert again.welcome["data"]["seq"] == seen["seq"], "the welcome has the requested position"
            for movie in [*missed, await alice.add(title="live")]:
                await again.sees(movie)
            assert again.seqs == list(range(seen["seq"] + 1, seen["seq"] + 22))


@pytest.mark.parametrize("position", ["since={here}999", "since=0&epoch=somethingelse", "since=somethingelse:0"])
async def test_an_invalid_position_gets_a_resync(service: Service, position: str) -> None:
    position = position.format(here=await service.position(999))
    async with service.person() as alice, service.watch(position) as watcher:
        resync = await watcher.next()
        assert (resync["operation"], resync["topic"]) == ("resync", None)
        assert resync["data"]["epoch"] == watcher.welcome["data"]["epoch"]
        assert resync["data"]["reason"]
        assert (await watcher.sees(await alice.add()))["seq"] == resync["data"]["seq"] + 1


async def test_watchers_get_a_resync_when_a_backup_is_restored_under_a_running_service(
    new_service: Callable[..., Service],
) -> None:
    """Sequence numbers that watchers have seen are reused. Only the epoch distinguishes new events from old ones."""
    service = new_service().start()
    async with service.person() as alice, service.watch() as watcher:
        for _ in range(5):
            await alice.add()
            last = await watcher.expect("add")
        await lose_newest(service.database_url, 3)
        resync = await watcher.next()
        assert resync["operation"] == "resync"
        assert resync["data"]["epoch"] != watcher.welcome["data"]["epoch"]
        assert resync["data"]["seq"] == last["seq"] - 3
        assert (await watcher.sees(await alice.add(title="numbered again")))["seq"] == last["seq"] - 2
        async with service.watch(f"since={last['seq']}&epoch={watcher.welcome['data']['epoch']}") as late:
            assert (await late.next())["operation"] == "resync"


async def test_watchers_get_a_resync_when_the_next_write_takes_the_number_of_a_lost_event(
    new_service: Callable[..., Service],
) -> None:
    """The head of the log is never seen below the watchers' position: the next write raises it again at once."""
    service = new_service().start()
    async with service.person() as alice, service.watch() as watcher:
        for _ in range(3):
            await alice.add()
            last = await watcher.expect("add")
        await lose_newest(service.database_url, 1)
        await alice.add(title="numbered again")
        resync = await watcher.next()
        assert (resync["operation"], resync["data"]["seq"]) == ("resync", last["seq"])
        assert resync["data"]["epoch"] != watcher.welcome["data"]["epoch"]
        assert (await watcher.sees(await alice.add()))["seq"] == last["seq"] + 1


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("?topics=planets", "topics"), ("?topics=", "topics"), ("?since=-1", "since"), ("?since=one", "since"),
        ("?since=99999999999999999999", "since"), ("?since=%D9%A1", "since"), ("?since=" + "0" * 5000, "since"),
        ("?since=" + "0" * 20 + "9" * 30, "since"), ("?since=0", "since"),
        ("?since=abc:1&epoch=abc", "since"), ("?since=:1", "since"), ("?since=1&epoch=" + "e" * 65, "epoch"),
        ("?bulk=everything", "bulk"), ("?epoch=abc", "since"),
        ("?color=red", "color"), ("?bulk=items&bulk=items", "bulk"),
    ],
)  # fmt: skip
@SQLITE_ONLY
async def test_an_invalid_query_is_refused_before_the_upgrade(service: Service, query: str, field: str) -> None:
    status, body = await refusal(service, query)
    assert status == 422
    assert [problem["loc"] for problem in body["detail"]] == [["query", field]]


@pytest.mark.parametrize(
    ("path", "headers", "status", "detail"),
    [
        ("/ws?since=-1", {}, 422, "since=<epoch>:<seq>"),
        ("/ws", {"Authorization": "Bearer x"}, 401, "not valid"),
        ("/ws", {"Authorization": "x"}, 401, "Bearer <token>"),
        ("/ws", {"Authorization": "Basic eDp5"}, 401, "Bearer <token>"),
        ("/ws", {"Origin": "https://elsewhere.example"}, 403, "ALLOWED_ORIGINS"),
        ("/websocket", {}, 404, "/ws"),
        ("/movies", {}, 404, "/ws"),
    ],
)
@SQLITE_ONLY
async def test_a_refused_handshake_gives_the_reason_and_logs_no_error(
    service: Service, path: str, headers: dict[str, str], status: int, detail: str
) -> None:
    got, body = await refusal(service, path=path, additional_headers=headers)
    assert got == status
    assert detail in str(body["detail"])
    async with service.anyone() as client:
        assert (await client.get("/healthz")).status_code == 200
    assert "without completing handshake" not in service.log()


@SQLITE_ONLY
async def test_a_plain_request_is_told_which_headers_are_missing(service: Service) -> None:
    async with service.anyone() as client:
        answer = await client.get("/ws")
        assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
        assert "Upgrade" in answer.json()["detail"]
        assert (await client.get("/nowhere")).status_code == 404


async def test_a_topic_for_admins_is_refused_to_others(service: Service) -> None:
    async with service.person() as alice, service.admin() as admin:
        assert (await refusal(service, "?topics=users"))[0] == 403
        assert (await refusal(service, "?topics=users", **signed_in(alice)))[0] == 403
        async with service.watch("topics=users", **signed_in(admin)) as watcher, service.person() as bob:
            event = await watcher.expect("add", "users")
            assert event["data"]["username"] == bob.name
            assert "password_hash" not in event["data"]


async def test_registrations_are_not_shown_to_the_public(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher, service.person():
        await alice.add(title="after the registration")
        assert (await watcher.next())["operation"] == "add"
        assert [event["topic"] for event in watcher.events] == ["movies"]


@SQLITE_ONLY
async def test_the_own_origin_and_clients_without_one_may_connect(service: Service) -> None:
    async with service.watch(origin=service.url), service.watch():  # a client without an origin is not a browser
        pass


@SQLITE_ONLY
async def test_allowed_origins_may_connect(new_service: Callable[..., Service]) -> None:
    service = new_service(ALLOWED_ORIGINS="https://app.example, https://other.example/").start()
    async with service.watch(origin="https://app.example"), service.watch(origin="https://other.example"):
        pass
    assert (await refusal(service, origin="https://app.example.evil.example"))[0] == 403
    assert (await refusal(service, origin="http://[x"))[0] == 403
    assert (await refusal(service, origin="null"))[0] == 403


async def test_credentials_come_by_header_or_subprotocol(service: Service) -> None:
    async with service.person() as alice:
        async with service.watch(**signed_in(alice)) as watcher:
            assert watcher.welcome["data"]["user_id"] == alice.id
        async with service.watch(subprotocols=["bearer", alice.token]) as watcher:
            assert watcher.socket.subprotocol == "bearer"
            assert watcher.welcome["data"]["user_id"] == alice.id


@SQLITE_ONLY
async def test_an_invalid_token_is_refused_in_the_handshake(service: Service) -> None:
    async with service.person() as alice:
        expired = alice.forged(exp=int(time.time()) - 60)
        for token in ("nonsense", expired, alice.forged(sub="999999"), alice.forged(aud="others")):
            status, body = await refusal(service, additional_headers={"Authorization": f"Bearer {token}"})
            assert (status, body["detail"]) == (401, "The access token is not valid or has expired")
            assert (await refusal(service, subprotocols=["bearer", token]))[0] == 401


async def test_a_first_message_can_authenticate(service: Service) -> None:
    async with service.admin() as admin, service.watch() as watcher:
        reply = await watcher.ask({"id": 3, "action": "auth", "token": admin.token})
        assert reply == {"reply_to": 3, "ok": True, "data": {"user_id": admin.id, "group": "admin"}}
        await watcher.sees(await admin.add())


async def test_a_socket_cannot_change_its_user(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        async with service.watch("topics=users", **signed_in(admin)) as watcher:
            reply = await watcher.ask({"id": 1, "action": "auth", "token": alice.token})
            assert (reply["ok"], reply["error"]["code"]) == (False, "another_user")
            assert (await watcher.ask({"id": 2, "action": "ping"}))["ok"]


async def test_an_invalid_token_in_a_message_ends_the_connection(service: Service) -> None:
    async with service.watch() as watcher:
        reply = await watcher.ask({"id": "a", "action": "auth", "token": "nonsense"})
        assert (reply["ok"], reply["error"]["code"]) == (False, "unauthenticated")
        assert (await closing(watcher))[0] == CloseCode.TOKEN_EXPIRED


@SQLITE_ONLY
async def test_a_token_that_expires_ends_the_connection_unless_it_is_renewed(service: Service) -> None:
    async with service.person() as alice:
        soon = {"Authorization": f"Bearer {alice.forged(exp=int(time.time()) + 2)}"}
        async with service.watch(additional_headers=soon) as watcher, service.watch(additional_headers=soon) as renewed:
            assert (await renewed.ask({"id": 1, "action": "auth", "token": alice.token}))["ok"]
            assert (await closing(watcher))[0] == CloseCode.TOKEN_EXPIRED
            with pytest.raises(TimeoutError):
                await renewed.next(1.0)


@pytest.mark.parametrize(
    ("message", "reply_to", "code"),
    [
        ("", None, "invalid_json"), ("{{", None, "invalid_json"), ("[" * 5000, None, "invalid_json"),
        ("[1]", None, "invalid_message"), ('"ping"', None, "invalid_message"), ('{"id": 1}', 1, "invalid_message"),
        ('{"id": 1, "action": 7}', 1, "invalid_message"), ('{"id": [], "action": "ping"}', None, "invalid_message"),
        ('{"id": true, "action": "ping"}', None, "invalid_message"),
        ('{"id": 1, "action": "ping", "loud": true}', 1, "invalid_message"),
        ('{"id": "x", "action": "dance"}', "x", "unknown_action"),
    ],
)  # fmt: skip
@SQLITE_ONLY
async def test_an_invalid_message_gets_an_error_and_the_stream_goes_on(
    service: Service, message: str, reply_to: Any, code: str
) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await watcher.socket.send(message)
        reply = await watcher.next()
        assert (reply["reply_to"], reply["ok"], reply["error"]["code"]) == (reply_to, False, code)
        assert reply["error"]["detail"]
        assert (await watcher.ask({"id": 2, "action": "ping"})) == {"reply_to": 2, "ok": True, "data": {}}
        await watcher.sees(await alice.add())


async def still_serves(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await watcher.sees(await alice.add())


@SQLITE_ONLY
async def test_a_binary_frame_gets_an_error_and_a_close(service: Service) -> None:
    async with service.watch() as watcher:
        await watcher.socket.send(b"\x00\x01")
        reply = await watcher.next()
        assert reply["error"]["code"] == "binary_frame"
        assert (await closing(watcher))[0] == CloseCode.PROTOCOL_ERROR
    await still_serves(service)


@SQLITE_ONLY
async def test_text_that_is_not_utf8_ends_the_connection(service: Service) -> None:
    async with service.watch() as watcher:
        await watcher.socket.send(b"\xff\xfe", text=True)
        assert (await closing(watcher))[0] == CloseCode.INVALID_TEXT
    await still_serves(service)


@pytest.mark.parametrize("size", [300_000, 1_000_000, 20_000_000])
@SQLITE_ONLY
async def test_a_frame_that_is_too_large_ends_the_connection(service: Service, size: int) -> None:
    async with service.watch() as watcher:
        sending = asyncio.create_task(watcher.socket.send("x" * size))
        assert (await closing(watcher))[0] == CloseCode.MESSAGE_TOO_BIG
        await asyncio.gather(sending, return_exceptions=True)
    await still_serves(service)


@SQLITE_ONLY
async def test_a_client_that_vanishes_disturbs_no_other(service: Service) -> None:
    async with service.watch() as watcher:
        watcher.socket.transport.abort()
    await still_serves(service)


@SQLITE_ONLY
async def test_a_client_that_sends_and_does_not_read_is_held_back(new_service: Callable[..., Service]) -> None:
    """Replies wait until the socket has room, so messages wait in the client and the network, not in the service."""
    service = new_service(RATE_LIMITS="off").start()
    async with service.watch(max_queue=1) as watcher:
        before = service.memory_bytes()
        ping = json.dumps({"id": "x" * 200, "action": "ping"})

        async def flood() -> None:
            for _ in range(200_000):
                await watcher.socket.send(ping)

        def is_held_back() -> bool:
            return watcher.socket.transport.get_write_buffer_size() > 30_000

        flooding = asyncio.create_task(flood())
        await eventually(is_held_back, "the flood is held back", 60)
        assert service.memory_bytes() - before < 8 * 2**20
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        watcher.socket.transport.abort()
    await still_serves(service)


@SQLITE_ONLY
async def test_a_client_that_does_not_read_does_not_delay_the_stop(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.watch(max_queue=1) as deaf:
        for _ in range(8):
            await alice.add_bulk([{"title": "x", "description": "y" * 2000}] * 1000)
        started = time.monotonic()
        assert await asyncio.to_thread(service.stop) == 0
        assert time.monotonic() - started < 10
        deaf.socket.transport.abort()


def test_the_service_frames_messages_as_the_library_does() -> None:
    for size in (0, 1, 125, 126, 127, 65_535, 65_536, 100_000):
        text = b"x" * size
        assert Frames([text]).wire == Frame(Opcode.TEXT, text).serialize(mask=False)
    assert Frames([b"a", b"bc"]).wire == b"\x81\x01a\x81\x02bc"
