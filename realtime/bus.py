"""The bus: how committed events reach every process quickly. It may lose anything; the log is the truth.

One channel, subscribed once per process, through `broadcaster`: `memory://` stays in the process, `redis://` uses the
backend below. `publish` never waits: events go to a bounded outbox, and what does not fit is dropped and counted, for
the feed fills every gap from the log. A worker hears its own heartbeats; when it does not, it is deaf and says so.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from broadcaster import Broadcast, BroadcastBackend
from broadcaster import Event as Published
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

import metrics
from repository.event_log import Event, Head

CHANNEL = "marquee.events"
OUTBOX_EVENTS = 10_000
OUTBOX_BYTES = 16 * 1024 * 1024
INBOX_MESSAGES = 10_000
INBOX_BYTES = 16 * 1024 * 1024
BATCH_EVENTS = 256
HEARTBEAT_SECONDS = 0.5
DEAF_AFTER_SECONDS = 1.5  # three heartbeats
RESUBSCRIBE_AFTER_SECONDS = 5.0  # a connection that is silent this long is half open
REDIS_TIMEOUT_SECONDS = 1.0
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0

log = structlog.get_logger("bus")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's place in the log."""

    worker: str
    head: Head


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The mark after each (re)subscription: what was published before it may be lost."""


@dataclass(frozen=True, slots=True)
class Nudge:
    """Something that is no event has changed in the database: look now. Whoever misses it looks by the clock."""

    topic: str


Message = Sequence[Event] | Heartbeat | Reconnected | Nudge


def _ignore(topic: str) -> None: ...


class Bus:
    """One per process. `run` is its life; `publish` may be called at any time."""

    def __init__(
        self,
        url: str,
        on_events: Callable[[Sequence[Event]], None],
        on_head: Callable[[Head], None],
        on_reconnect: Callable[[], None],
        on_nudge: Callable[[str], None] = _ignore,
    ) -> None:
        self.is_shared = not url.startswith("memory")
        self.worker = uuid.uuid4().hex
        self.dropped = 0
        self._on_events = on_events
        self._on_head = on_head
        self._on_reconnect = on_reconnect
        self._on_nudge = on_nudge
        self._redis = RedisBackend(url) if self.is_shared else None
        self._broadcast = Broadcast(backend=self._redis) if self._redis else Broadcast("memory://")
        self._outbox: deque[Event] = deque()
        self._outbox_bytes = 0
        self._nudges: dict[str, None] = {}
        self._waiting = asyncio.Event()
        self._heard_at = time.monotonic()

    @property
    def is_deaf(self) -> bool:
        """Whether a shared bus has been silent for longer than it can be when it works."""
        return self.is_shared and time.monotonic() - self._heard_at > DEAF_AFTER_SECONDS

    def publish(self, events: Sequence[Event]) -> None:
        for event in events:
            if len(self._outbox) >= OUTBOX_EVENTS or self._outbox_bytes + event.size > OUTBOX_BYTES:
                self.dropped += 1
                metrics.BUS_DROPPED_UNSENT.inc()
                continue
            self._outbox.append(event)
            self._outbox_bytes += event.size
        self._waiting.set()

    def nudge(self, topic: str) -> None:
        """Tell every process, this one as well, to look at `topic`. Many at once are one."""
        self._nudges[topic] = None
        self._waiting.set()

    async def run(self, current_head: Callable[[], Head]) -> None:
        """Listen and publish until cancelled."""
        await self._broadcast.connect()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(), name="bus-listen")
                tasks.create_task(self._send(), name="bus-send")
                if self.is_shared:
                    tasks.create_task(self._beat(current_head), name="bus-beat")
        finally:
            await self._broadcast.disconnect()

    async def _listen(self) -> None:
        async with self._broadcast.subscribe(CHANNEL) as subscriber:
            while True:
                message: Any = (await subscriber.get()).message
                if isinstance(message, Heartbeat):
                    if message.worker == self.worker:
                        self._heard_at = time.monotonic()
                    self._on_head(message.head)
                elif isinstance(message, Reconnected):
                    self._on_reconnect()
                elif isinstance(message, Nudge):
                    self._on_nudge(message.topic)
                else:
                    self._on_events(message)

    async def _send(self) -> None:
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while self._outbox:
                batch = [self._outbox.popleft() for _ in range(min(len(self._outbox), BATCH_EVENTS))]
                self._outbox_bytes -= sum(event.size for event in batch)
                await self._publish(batch, len(batch))
            nudges, self._nudges = self._nudges, {}
            for topic in nudges:
                await self._publish(Nudge(topic), 0)

    async def _publish(self, message: Message, count: int) -> None:
        try:
            await self._broadcast.publish(CHANNEL, message)
        except (RedisError, OSError, TimeoutError) as error:
            self.dropped += count
            metrics.BUS_DROPPED_UNSENT.inc(count)
            log.debug("not published; the log has it", events=count, reason=str(error))

    async def _beat(self, current_head: Callable[[], Head]) -> None:
        was_deaf = False
        while True:
            await self._publish(Heartbeat(self.worker, current_head()), 0)
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if self.is_deaf != was_deaf:
                was_deaf = not was_deaf
                if was_deaf:
                    log.warning("bus silent; reading the log instead")
                else:
                    log.info("bus heard again")
            if time.monotonic() - self._heard_at > RESUBSCRIBE_AFTER_SECONDS and self._redis is not None:
                self._redis.resubscribe()


class RedisBackend(BroadcastBackend):
    """Redis pub/sub for `broadcaster`: its own reader with back-off and resubscription, and pipelined publishes.

    The stock backend delivers nothing with redis-py 8 and stays deaf after an outage. Messages are the ones of this
    module; they are encoded here.
    """

    def __init__(self, url: str) -> None:
        retry: Any = Retry(NoBackoff(), 0)  # errors come to us at once: we know better what to do with them
        self._publisher: Redis = Redis.from_url(
            url, socket_timeout=REDIS_TIMEOUT_SECONDS, socket_connect_timeout=REDIS_TIMEOUT_SECONDS, retry=retry
        )
        self._subscriber: Redis = Redis.from_url(
            url, socket_connect_timeout=REDIS_TIMEOUT_SECONDS, socket_timeout=None, retry=retry
        )
        # What arrives faster than it is read is dropped here; the log has it.
        self._inbox: asyncio.Queue[tuple[int, Published]] = asyncio.Queue(INBOX_MESSAGES)
        self._inbox_bytes = 0
        self._reader: asyncio.Task[None] | None = None
        self._again = asyncio.Event()

    async def connect(self) -> None:
        """Connecting is the reader's business: the service starts without Redis, too."""

    async def disconnect(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._publisher.aclose()
        await self._subscriber.aclose()

    async def subscribe(self, group: str) -> None:
        self._reader = asyncio.create_task(self._read(group), name="bus-redis-reader")

    async def unsubscribe(self, group: str) -> None:
        if self._reader is not None:
            self._reader.cancel()

    def resubscribe(self) -> None:
        """Give up the present connection."""
        self._again.set()

    async def publish(self, channel: str, message: Message) -> None:
        if isinstance(message, Heartbeat):
            await self._publisher.publish(channel, _encode_heartbeat(message))
            return
        if isinstance(message, Nudge):
            await self._publisher.publish(channel, orjson.dumps({"nudge": message.topic}))
            return
        assert not isinstance(message, Reconnected)
        pipeline = self._publisher.pipeline(transaction=False)
        for event in message:
            pipeline.publish(channel, _encode_event(event))
        await pipeline.execute()

    async def next_published(self) -> Published:
        size, message = await self._inbox.get()
        self._inbox_bytes -= size
        return message

    async def _read(self, channel: str) -> None:
        backoff = MIN_BACKOFF_SECONDS
        is_first = True
        while True:
            self._again.clear()
            try:
                async with self._subscriber.pubsub() as pubsub:
                    await asyncio.wait_for(pubsub.subscribe(channel), REDIS_TIMEOUT_SECONDS)
                    self._deliver(channel, Reconnected())
                    if not is_first:
                        metrics.BUS_RECONNECTS.inc()
                    is_first = False
                    while not self._again.is_set():
                        found = await pubsub.get_message(ignore_subscribe_messages=True, timeout=HEARTBEAT_SECONDS)
                        if found is not None and found["type"] == "message":
                            self._deliver(channel, _decode(found["data"]), len(found["data"]))
                            backoff = MIN_BACKOFF_SECONDS
            except (RedisError, OSError, TimeoutError) as error:
                log.debug("bus connection lost", reason=str(error))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("not a message of ours on the bus", reason=str(error))
            except Exception as error:
                # Whatever it is: a reader that ended would leave the worker deaf for ever.
                log.error("reading the bus failed", exc_info=error)
            # Jittered, so that many workers do not come back in one instant.
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    def _deliver(self, channel: str, message: Message, size: int = 0) -> None:
        if self._inbox.full() or self._inbox_bytes + size > INBOX_BYTES:
            metrics.BUS_DROPPED_UNREAD.inc()
            log.debug("bus inbox full; the log has it")
            return
        self._inbox_bytes += size
        self._inbox.put_nowait((size, Published(channel, message)))  # type: ignore[arg-type]


def _encode_heartbeat(beat: Heartbeat) -> bytes:
    return orjson.dumps({"worker": beat.worker, "epoch": beat.head.epoch, "seq": beat.head.seq})


def _encode_event(event: Event) -> bytes:
    """A line of JSON, then the payload, then what was before, as they are."""
    header = {
        "epoch": event.epoch,
        "seq": event.seq,
        "topic": event.topic,
        "operation": event.operation,
        "entity_id": event.entity_id,
        "audience": event.audience,
        "changed": event.changed,
        "actor_id": event.actor_id,
        "created_at": event.created_at,
        "payload": len(event.payload),
        "before": event.before is not None,
    }
    return b"".join((orjson.dumps(header), b"\n", event.payload, event.before or b""))


def _decode(data: bytes) -> Message:
    end = data.find(b"\n")
    if end < 0:
        beat = orjson.loads(data)
        if "nudge" in beat:
            return Nudge(beat["nudge"])
        return Heartbeat(beat["worker"], Head(beat["epoch"], beat["seq"]))
    header = orjson.loads(data[:end])
    payload_end = end + 1 + header["payload"]
    return (
        Event(
            header["epoch"],
            header["seq"],
            header["topic"],
            header["operation"],
            header["entity_id"],
            header["audience"],
            data[end + 1 : payload_end],
            data[payload_end:] if header["before"] else None,
            tuple(header["changed"]),
            header["actor_id"],
            header["created_at"],
        ),
    )
