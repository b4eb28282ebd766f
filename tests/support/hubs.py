"""Stand-ins for what a hub and its subscriptions use, and a random history of events."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, cast

import orjson

from core.filters import Filter, parse_json
from realtime.fanout.evaluation import Evaluation
from realtime.fanout.hub import Hub
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import Subscription
from realtime.wire.frames import Frames
from realtime.wire.room import Room
from repository.engine.events import Event, Head
from resources.movies import MOVIES

PAGE_EVENTS = 3


class Log:
    """The part of a feed that a hub and its subscriptions read. The "ring" holds the events after `oldest`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.generation = 0
        self.oldest = 0
        self.reads: list[int] = []  # the positions that were not in the ring

    @property
    def head(self) -> Head:
        return Head("e", len(self.events))

    async def read_after(self, seq: int) -> list[Event]:
        if seq < self.oldest:
            self.reads.append(seq)
            await asyncio.sleep(0)
        return self.events[seq : seq + PAGE_EVENTS]

    def newest_after(self, seq: int) -> list[Event] | None:
        return self.events[seq : seq + PAGE_EVENTS] if seq >= self.oldest else None


class KeptTexts:
    """A writer that keeps all texts. As long as `unsent` is not 0, its socket is full."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.unsent = 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    def write(self, frames: Frames) -> None:
        self.texts += frames.texts

    def fill(self, size: int) -> None:
        self.unsent = size
        self._has_room.clear()

    def drain(self) -> None:
        self.unsent = 0
        self._has_room.set()

    def buffered(self) -> int:
        return self.unsent

    def taken(self) -> int:
        return 0

    async def drained(self) -> None:
        await self._has_room.wait()

    def count_control_frames(self, on_control_frame: Callable[[], bool]) -> None:
        pass

    def close(self, code: int) -> None:
        raise AssertionError(code)


class Source:
    """A stand-in for the source of snapshots, for subscriptions without a snapshot."""

    def __init__(self) -> None:
        self.evaluation = Evaluation()


class Stage:
    """A hub that delivers the events of a log to subscriptions, each with a socket of its own."""

    def __init__(self) -> None:
        self.log = Log()
        self.hub = Hub(cast(Any, self.log))
        self._source = Source()

    def subscribe(self, spec: Spec) -> tuple[Subscription, KeptTexts]:
        """Begin a subscription at the head."""
        writer = KeptTexts()
        parts = cast(Any, {"feed": self.log, "live": self.hub, "snapshots": self._source})
        subscription = Subscription(spec, writer, Room(writer), **parts)
        subscription.start(self.log.head.seq)
        return subscription, writer

    def publish(self, *events: Event) -> None:
        self.log.events += events
        self.hub.publish(events)


def movie(key: int, rating: int) -> dict[str, Any]:
    return {"id": key, "title": "Ab" * (rating % 3 + 1), "rating": rating, "genres": [], "user_id": 1}


def added(seq: int) -> Event:
    """Return the event of an added movie."""
    return Event("e", seq, "movies", "add", str(seq), "public", orjson.dumps(movie(seq, 5)), None, (), 1, "t")


def history(dice: random.Random, length: int) -> list[Event]:
    """Return a history of random events, some of which have many rows."""
    rows: dict[int, dict[str, Any]] = {}
    events = []
    for seq in range(1, length + 1):
        keys = dice.sample(range(1, 30), dice.choice((1, 1, 1, 12)))
        old = [rows[key] for key in keys if key in rows]
        operation = dice.choice(("add", "update", "delete")) if old else "add"
        if operation == "add":
            new = [movie(key, dice.randint(1, 9)) for key in keys if key not in rows] or [movie(1_000 + seq, 1)]
            payload, before = {"count": len(new), "items": new}, None
        elif operation == "update":
            new = [movie(row["id"], dice.randint(1, 9)) for row in old]
            payload, before = {"count": len(new), "items": new}, orjson.dumps(old)
        else:
            new, ids = [], [row["id"] for row in old]
            payload, before = {"count": len(ids), "ids": ids}, orjson.dumps(old)
            for key in ids:
                del rows[key]
        rows |= {row["id"]: row for row in new}
        changed = ("rating",) if operation == "update" else ()
        encoded = orjson.dumps(payload)
        events.append(Event("e", seq, "movies", f"{operation}_bulk", None, "public", encoded, before, changed, 1, "t"))
    return events


def wanted_by(value: dict[str, Any]) -> Filter:
    wanted, problems = parse_json(value, MOVIES.fields)
    assert not problems
    return wanted
