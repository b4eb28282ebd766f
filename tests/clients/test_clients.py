"""The Python client's core, without I/O. tests/clients/test_conformance.py tests the clients as a whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.python import marquee_client as marquee
from clients.python.marquee_client.client import _with_small_default
from clients.python.marquee_client.queues import Queue
from clients.python.marquee_client.retry import Ending, Pacer
from clients.python.marquee_client.session import MAX_ATTEMPTS, Call, ServerSilent, Session
from clients.python.marquee_client.subscription import SubscribeOptions, Subscription
from clients.python.marquee_client.view import QUEUED_CHANGES, Rows
from tests.support.client_sessions import connected, connected_session, ok, sent
from tests.support.service import eventually

# --- when to reconnect


def pacer(*, can_renew: bool = False, chance: float = 1.0, **retry: float) -> Pacer:
    return Pacer(marquee.Retry(**retry), can_renew, lambda: chance)


def test_pauses_double_up_to_the_longest() -> None:
    pace = pacer()
    assert [pace.after(Ending()) for _ in range(8)] == [0.25, 0.5, 1, 2, 4, 8, 15, 15]


def test_every_pause_is_random_and_may_be_zero() -> None:
    pace = pacer(chance=0.0)
    assert [pace.after(Ending()) for _ in range(5)] == [0, 0, 0, 0, 0]


def test_pauses_start_again_after_a_connection_that_lasted() -> None:
    pace = pacer()
    assert [pace.after(Ending()) for _ in range(3)] == [0.25, 0.5, 1]
    assert pace.after(Ending(1012, lasted_seconds=4.9)) == 2
    assert pace.after(Ending(1012, lasted_seconds=5.0)) == 0.25


def test_many_attempts_overflow_nothing() -> None:
    pace = pacer()
    assert {pace.after(Ending()) for _ in range(100_000)} >= {0.25, 15}


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1012, 4000, 4008, 4429, 4499, 408, 429, 500, 502, 503, None])
def test_a_temporary_end_is_followed_by_another_attempt(code: int | None) -> None:
    assert pacer().after(Ending(code)) < 5


FINAL = {
    marquee.Forbidden: (403, 4503), marquee.Unauthorized: (401, 4501),
    marquee.ProtocolViolation: (1007, 1009, 4509), marquee.Refused: (404, 422, 4500, 4999),
}  # fmt: skip


@pytest.mark.parametrize(("error", "code"), [(error, code) for error, codes in FINAL.items() for code in codes])
def test_a_final_end_raises(code: int, error: type[marquee.Refused]) -> None:
    with pytest.raises(error) as raised:
        pacer().after(Ending(code, "why"))
    assert (raised.value.code, raised.value.detail) == (code, "why")


def test_a_token_is_renewed_once_before_it_is_final() -> None:
    pace = pacer(can_renew=True)
    pace.after(Ending(4501, lasted_seconds=900))
    pace.after(Ending(1012, lasted_seconds=1))
    with pytest.raises(marquee.Unauthorized):
        pace.after(Ending(401))
    pace = pacer(can_renew=True)
    for _ in range(3):
        pace.after(Ending(4501, lasted_seconds=900))


def test_retry_after_is_respected_up_to_a_minute() -> None:
    assert pacer(chance=0.0).after(Ending(503, retry_after_seconds=7)) == 7
    assert pacer(chance=0.0).after(Ending(503, retry_after_seconds=86_400)) == 60


# --- positions, addresses, rows


@given(st.text(st.characters(codec="ascii", exclude_characters=":"), min_size=1), st.integers(0, 2**63))
def test_a_position_survives_parsing_its_text(epoch: str, seq: int) -> None:
    assert marquee.Position.parse(str(marquee.Position(epoch, seq))) == marquee.Position(epoch, seq)


@pytest.mark.parametrize("text", ["", "12", ":12", "e1:", "e1:-1", "e1:1.5", "e1:²"])
def test_an_invalid_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        marquee.Position.parse(text)


def test_the_default_subscription_is_small_unless_the_address_names_one() -> None:
    assert _with_small_default("ws://h/ws") == "ws://h/ws?topics=jobs&bulk=summary"
    assert _with_small_default("wss://h/ws?topics=movies&x=1") == "wss://h/ws?topics=movies&x=1&bulk=summary"
    for address in ("http://h/ws", "h/ws", ""):
        with pytest.raises(ValueError, match="expected a URL"):
            marquee.Client(address)


def event(operation: str, **data: Any) -> marquee.Event:
    return marquee.Event(operation, "movies", 1, data)


def test_rows_return_the_changes_that_events_make() -> None:
    rows = Rows()
    rows.replace([{"id": 1, "a": 0}, {"id": 2}])
    one, two = {"id": 1, "a": 1}, {"id": 3}
    events = [event("update_bulk", items=[one, two]), event("delete_bulk", ids=[2, 77])]
    assert rows.apply(events) == [
        marquee.Change("update", 1, one, {"id": 1, "a": 0}),
        marquee.Change("add", 3, two, None),
        marquee.Change("delete", 2, None, {"id": 2}),
    ]
    assert rows.by_id == {1: one, 3: two}


def test_a_malformed_event_changes_no_row() -> None:
    rows = Rows()
    rows.replace([{"id": 1}])
    with pytest.raises(KeyError):
        rows.apply([event("delete", id=1), event("add", title="no id")])
    assert rows.by_id == {1: {"id": 1}}


# --- the session, without a socket


@dataclass
class Answers:
    """The outcome of a call: its reply or its error."""

    reply: Any = None
    error: marquee.MarqueeError | None = None

    def call(self, is_repeatable: bool = False, **message: Any) -> Call:
        return Call(
            {"action": "ping", **message}, lambda reply: setattr(self, "reply", reply), self._fail, is_repeatable
        )

    def _fail(self, error: marquee.MarqueeError) -> None:
        self.error = error


def test_a_silent_server_is_pinged_after_one_heartbeat_and_given_up_after_two() -> None:
    session = connected_session()
    assert session.beat(19.9) == pytest.approx(0.1)
    assert session.beat(20.0) == pytest.approx(20.0)
    assert [message["action"] for message in sent(session)] == ["ping"]
    assert session.beat(39.9) == pytest.approx(0.1)
    with pytest.raises(ServerSilent):
        session.beat(40.0)


def test_any_frame_is_a_sign_of_life() -> None:
    session = connected_session()
    session.beat(20.0)
    session.receive('{"operation": "progress", "topic": "jobs", "data": {}}', 39.0)
    assert session.beat(40.0) == pytest.approx(19.0)


def test_a_process_that_was_suspended_pings_before_it_gives_up() -> None:
    session = connected_session()
    assert session.beat(3600.0) == pytest.approx(20.0)


def test_a_server_without_a_welcome_is_given_up() -> None:
    session = Session()
    session.connected(0.0)
    session.beat(9.0)
    with pytest.raises(ServerSilent):
        session.beat(10.0)


def test_a_call_that_ends_every_connection_is_given_up() -> None:
    session, caller = Session(), Answers()
    session.call(caller.call(is_repeatable=True))
    for _ in range(MAX_ATTEMPTS - 1):
        assert len(connected(session)) == 1
        session.lost()
        assert caller.error is None
    connected(session)
    session.lost()
    assert isinstance(caller.error, marquee.ConnectionLost)
    assert connected(session) == []


def test_a_forgotten_call_counts_as_in_flight_until_its_reply() -> None:
    session, callers = Session(), [Answers() for _ in range(17)]
    calls = [caller.call(action="request", path=f"/{number}") for number, caller in enumerate(callers)]
    for call in calls:
        session.call(call)
    first = connected(session)
    assert len(first) == 16
    session.forget(calls[0])
    assert sent(session) == []
    session.receive(json.dumps({"reply_to": first[0]["id"], "status": 200}), 1.0)
    assert [message["path"] for message in sent(session)] == ["/16"]
    assert callers[0] == Answers()


def test_a_message_that_is_too_large_is_not_sent() -> None:
    session = Session()
    with pytest.raises(ValueError, match="at most 262144 bytes"):
        session.call(Answers().call(body="é" * 131_072))
    session.call(Answers().call(body="é" * 131_000))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '{"operation": "welcome"}', '{"operation": "resync", "data": 1}']
)
def test_an_invalid_frame_ends_the_connection_and_not_the_client(text: str) -> None:
    session = connected_session()
    with pytest.raises(marquee.ProtocolViolation):
        session.receive(text, 1.0)
    assert session.error is None


class Sink:
    """A receiver that records the event numbers and the rows of a subscription."""

    def __init__(self) -> None:
        self.events: list[int | None] = []
        self.rows: list[Any] = []

    def began(self, position: marquee.Position) -> None: ...

    def take(self, events: Sequence[marquee.Event], size: int) -> None:
        self.events.extend(event.seq for event in events)

    def resynced(self, resync: marquee.Resync) -> None: ...

    def replaced(self, rows: Sequence[Any], position: marquee.Position) -> None:
        self.rows.append((list(rows), position.seq))

    def failed(self, error: marquee.MarqueeError) -> None: ...


def subscribed(**options: Any) -> tuple[Subscription, Sink]:
    subscription = Subscription(SubscribeOptions(("movies",), **options), sink := Sink())
    subscription.subscribe("s1")
    subscription.accepted(10, "e1")
    return subscription, sink


def test_an_event_that_was_seen_before_is_ignored() -> None:
    subscription, sink = subscribed()
    for seq in (10, 11, 11, 12, 9):
        subscription.receive({"operation": "add", "topic": "movies", "seq": seq, "data": {"id": seq}}, "e1", 1)
    assert sink.events == [11, 12]


def test_a_snapshot_that_starts_again_drops_the_earlier_pages() -> None:
    subscription, sink = subscribed(snapshot=True)
    for seq, key, done in ((10, 1, False), (12, 2, False), (12, 3, True)):
        page = {"items": [{"id": key}], "done": done}
        subscription.receive({"operation": "snapshot", "topic": "movies", "seq": seq, "data": page}, "e1", 1)
    assert sink.rows == [([{"id": 2}, {"id": 3}], 12)]


async def test_a_final_error_reaches_every_call_watch_and_view() -> None:
    session, caller = Session(), Answers()
    watch = marquee.Watch(session, lambda: None, SubscribeOptions(("movies",)), None)
    view = marquee.View(session, lambda: None, SubscribeOptions(("movies",)))
    session.call(caller.call())
    ready = [asyncio.ensure_future(each.ready()) for each in (watch, view)]
    await asyncio.sleep(0)
    session.fail(marquee.Forbidden(4503, "no"))
    errors = await asyncio.gather(*ready, return_exceptions=True)
    assert [type(error) for error in errors] == [marquee.Forbidden] * 2
    assert isinstance(caller.error, marquee.Forbidden)
    with pytest.raises(marquee.Forbidden):
        len(view)
    late = marquee.View(session, lambda: None, SubscribeOptions(("movies",)))
    with pytest.raises(marquee.Forbidden):
        await late.ready()


async def test_the_rows_of_a_closed_view_can_still_be_read() -> None:
    session = Session()
    view = marquee.View(session, lambda: None, SubscribeOptions(("movies",), snapshot=True))
    async with view:
        [subscribe] = connected(session)
        session.receive(ok(subscribe, subscription=subscribe["as"], seq=1), 0.0)
        page = {"operation": "snapshot", "topic": "movies", "subscription": subscribe["as"], "seq": 1}
        session.receive(json.dumps({**page, "data": {"items": [{"id": 5}], "done": True}}), 0.0)
    assert dict(view) == {5: {"id": 5}}
    assert [change async for change in view.changes()] == []
    with pytest.raises(marquee.ClientClosed):
        await view.ready()


async def test_too_many_unread_changes_become_one_reset() -> None:
    view = marquee.View(Session(), lambda: None, SubscribeOptions(("movies",), snapshot=True))
    changes = view.changes()
    items = [{"id": number} for number in range(QUEUED_CHANGES + 1)]
    view.take([marquee.Event("add_bulk", "movies", 1, {"items": items}, marquee.Position("e1", 1))], 1)
    view.take([marquee.Event("add", "movies", 2, {"id": -1}, marquee.Position("e1", 2))], 1)
    assert [(await anext(changes)).kind for _ in range(2)] == ["reset", "add"]
    assert len(view) == QUEUED_CHANGES + 2


async def test_a_queue_delivers_everything_before_its_end() -> None:
    queue: Queue[int] = Queue()
    queue.put([1, 2])
    queue.end(marquee.ConnectionLost("cut"))
    assert [await queue.get(), await queue.get()] == [1, 2]
    with pytest.raises(marquee.ConnectionLost):
        await queue.get()


async def test_leaving_the_loop_ends_the_subscription() -> None:
    session = Session()
    watch = marquee.Watch(session, lambda: None, SubscribeOptions(("movies",)), marquee.Position("e1", 0))

    async def first() -> int | None:
        async for item in watch:
            assert isinstance(item, marquee.Event)
            return item.seq
        return None

    reading = asyncio.ensure_future(first())
    await asyncio.sleep(0)
    [subscribe] = connected(session)
    session.receive(ok(subscribe, subscription=subscribe["as"], seq=0), 0.0)
    add = {"operation": "add", "topic": "movies", "subscription": subscribe["as"], "seq": 1, "data": {"id": 1}}
    session.receive(json.dumps(add), 0.0)
    assert await reading == 1

    async def messages() -> list[dict[str, Any]]:
        return sent(session)

    assert [message["action"] for message in await eventually(messages, "a message is sent")] == ["unsubscribe"]
    assert watch.position == marquee.Position("e1", 0), "the loop ended before the event was processed"
