"""A view is correct and a watch misses nothing, wherever the connection is cut. No test here opens a socket."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from clients.python.marquee_client import Event, Position, Resync, View, Watch
from clients.python.marquee_client.session import Session
from clients.python.marquee_client.subscription import SubscribeOptions
from clients.python.marquee_client.watch import QUEUED_EVENTS
from tests.support.client_sessions import sent, welcome


@dataclass
class Log:
    """A model of the service: a log of events, the rows that result from them, and how far the log is pruned."""

    epoch: str = "e1"
    groups: list[list[dict[str, Any]]] = field(default_factory=list)  # the frames of event 1, 2, …
    pruned: int = 0
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def head(self) -> int:
        return len(self.groups)

    def write(self, chance: random.Random) -> None:
        def row() -> dict[str, Any]:
            return {"id": chance.randrange(12), "x": chance.random()}

        frames = []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            kind = chance.choice(("add", "update", "delete", "add_bulk", "update_bulk", "delete_bulk"))
            if kind == "delete":
                data: dict[str, Any] = {"id": chance.randrange(12)}
            elif kind == "delete_bulk":
                data = {"ids": chance.sample(range(12), 3)}
            else:
                data = {"items": [row(), row()]} if kind.endswith("_bulk") else row()
            frames.append({"operation": kind, "topic": "movies", "seq": self.head + 1, "data": data, "more": True})
            for key in data.get("ids", [data.get("id")] if kind == "delete" else []):
                self.rows.pop(key, None)
            if kind not in ("delete", "delete_bulk"):
                self.rows.update({item["id"]: item for item in data.get("items", [data])})
        del frames[-1]["more"]
        self.groups.append(frames)

    def replace(self) -> None:
        self.epoch, self.groups, self.pruned = self.epoch + "'", [], 0


class ModelServer:
    """A server that queues frames for its client and sends them one at a time."""

    def __init__(self, log: Log, session: Session, chance: random.Random) -> None:
        self.log, self.session, self.chance = log, session, chance
        self.is_connected = False
        self.owed: list[dict[str, Any]] = []
        self.positions: dict[str, int] = {}

    def connect(self) -> None:
        self.is_connected, self.owed, self.positions = True, [], {}
        self.session.connected(0.0)
        self.session.receive(welcome(self.log.head, self.log.epoch), 0.0)

    def cut(self) -> None:
        self.is_connected = False
        self.session.lost()

    def listen(self) -> None:
        for message in sent(self.session):
            name: str = message.get("as") or message.get("subscription", "")
            if message["action"] == "unsubscribe":
                self.positions.pop(name, None)
                self.owed.append({"reply_to": message["id"], "ok": True, "data": {"subscription": name}})
            elif message["action"] == "subscribe":
                self._subscribe(name, message)

    def _subscribe(self, name: str, message: dict[str, Any]) -> None:
        log, since = self.log, message.get("since")
        is_valid = since is not None and message["epoch"] == log.epoch and log.pruned <= since <= log.head
        seq = since if since is not None and is_valid else log.head
        self.owed.append({"reply_to": message["id"], "ok": True, "data": {"subscription": name, "seq": seq}})
        if since is not None and not is_valid:
            self._resync(name)
        if message.get("snapshot") and not is_valid:
            self._snapshot(name)
        self.positions[name] = seq

    def _resync(self, name: str) -> None:
        data = {"reason": "model", "epoch": self.log.epoch, "seq": self.log.head}
        self.owed.append({"operation": "resync", "topic": None, "subscription": name, "data": data})

    def _snapshot(self, name: str) -> None:
        rows, half = list(self.log.rows.values()), len(self.log.rows) // 2
        for items, done in ((rows[:half], False), (rows[half:], True)):
            data = {"items": items, "done": done}
            frame = {"operation": "snapshot", "topic": "movies", "subscription": name, "seq": self.log.head}
            self.owed.append({**frame, "data": data})

    def replace_log(self, snapshots: Sequence[str]) -> None:
        """Replace the log. Connected subscriptions get a resync after the frames that are already queued for them."""
        self.fill()
        self.log.replace()
        for name in self.positions:
            self._resync(name)
            if name in snapshots:
                self._snapshot(name)
            self.positions[name] = self.log.head

    def fill(self) -> None:
        for name, position in self.positions.items():
            for group in self.log.groups[position:]:
                self.owed.extend({**frame, "subscription": name} for frame in group)
            self.positions[name] = self.log.head

    def deliver(self, number: int) -> None:
        for _ in range(number):
            self.listen()
            if not self.owed:
                self.fill()
            if not self.owed:
                return
            self.session.receive(json.dumps(self.owed.pop(0)), 0.0)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.lists(st.sampled_from("wwwwddddddccprrsl"), min_size=5, max_size=80))
def test_a_view_is_right_and_a_watch_misses_nothing_after_any_cuts(seed: int, steps: list[str]) -> None:
    asyncio.run(play(random.Random(seed), steps))


async def play(chance: random.Random, steps: list[str]) -> None:
    log, session = Log(), Session()
    server = ModelServer(log, session, chance)
    view = View(session, lambda: None, SubscribeOptions(("movies",), snapshot=True))
    watch = Watch(session, lambda: None, SubscribeOptions(("movies",)), Position("e1", 0))
    seen: list[Event | Resync] = []

    async def read() -> None:
        async for item in watch:
            seen.append(item)  # noqa: PERF401 (items must be added as they arrive)

    reading = asyncio.ensure_future(read())
    async with view:
        await asyncio.sleep(0)
        for step in steps:
            if step == "w":
                log.write(chance)
            elif step == "c":
                server.cut() if server.is_connected else server.connect()
            elif step == "d" and server.is_connected:
                server.deliver(chance.randint(1, 6))
            elif step == "p":
                log.pruned = log.head
            elif step == "r" and server.is_connected:
                server.session.pause(watch._subscription)
            elif step == "s":
                server.session.resume(watch._subscription)
            elif step == "l" and chance.random() < 0.3:
                server.listen()
                subscriptions = session._by_name if server.is_connected else {}
                server.replace_log(
                    [name for name, subscription in subscriptions.items() if subscription.options.snapshot]
                )
            await asyncio.sleep(0)
        server.session.resume(watch._subscription)
        if not server.is_connected:
            server.connect()
        server.deliver(10**6)
        await asyncio.sleep(0)
        assert dict(view) == log.rows
        assert view.position == Position(log.epoch, log.head)
        assert_no_gap(log, seen)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


def assert_no_gap(log: Log, seen: list[Event | Resync]) -> None:
    """Assert that each event came once, whole and in order, up to the head. Only a resync may skip events."""
    position = Position("e1", 0)
    shown: list[tuple[Any, ...]] = []
    for item in seen:
        if isinstance(item, Resync):
            assert not shown or not shown[-1][-1], "expected all frames of an event, got a resync between them"
            position, shown = item.position, []
            continue
        assert item.seq == position.seq + 1
        assert item.position == (position if item.more else Position(position.epoch, item.seq))
        shown.append((item.seq, item.operation, item.data, item.more))
        if not item.more:
            position = Position(position.epoch, item.seq)
    assert position == Position(log.epoch, log.head)
    expected = [
        (frame["seq"], frame["operation"], frame["data"], frame.get("more", False))
        for group in log.groups
        for frame in group
    ]
    assert shown == expected[len(expected) - len(shown) :]


async def test_a_watch_that_is_not_read_queues_a_bounded_number_of_events() -> None:
    log, session = Log(), Session()
    chance = random.Random(1)
    server = ModelServer(log, session, chance)
    watch = Watch(session, lambda: None, SubscribeOptions(("movies",)), Position("e1", 0))
    for _ in range(3 * QUEUED_EVENTS):
        log.write(chance)
    async with asyncio.timeout(30), watch:
        server.connect()
        server.deliver(10**6)
        assert QUEUED_EVENTS <= len(watch._queue.items) < QUEUED_EVENTS + 3
        assert server.positions == {}
        seen: list[Event | Resync] = []
        async for item in watch:
            seen.append(item)
            server.deliver(10**6)
            if item.position == Position("e1", log.head):
                break
    assert_no_gap(log, seen)
