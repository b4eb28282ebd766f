"""A Redis pub/sub backend for `broadcaster`.

Rules:
- The backend reconnects by itself, and delivers `Reconnected` after each subscription, because earlier messages may
  have been lost.
- A message arrives whole or not at all. Messages that are not signed with a known secret key are counted and skipped,
  with a warning at most once a minute. No event is lost, because the event log has every event.
- Both queues are bounded: the inbox here (INBOX_MESSAGES, INBOX_BYTES), and the outbox in `realtime.feed.bus`.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import orjson
import structlog
from broadcaster import BroadcastBackend
from broadcaster import Event as Published
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core import metrics
from realtime.feed.bus_messages import HEARTBEAT_SECONDS, Heartbeat, Message, Nudge, Reconnected
from realtime.feed.signer import Signer
from repository.engine.events import Event, Head

INBOX_MESSAGES = 10_000
INBOX_BYTES = 16 * 1024 * 1024
BUS_TIMEOUT_SECONDS = 1.0
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0
SECONDS_BETWEEN_LOG_LINES = 60.0  # limits the warnings, because anyone with access to Redis can send invalid messages

log = structlog.get_logger("bus")


class RedisBackend(BroadcastBackend):
    """A backend with its own reader task, which backs off and resubscribes, and with pipelined publishing.

    `broadcaster`'s own Redis backend delivers nothing with redis-py 8, and receives nothing after an outage.
    """

    def __init__(self, url: str, signer: Signer) -> None:
        self._signer = signer
        retry: Any = Retry(NoBackoff(), 0)  # no retries, because the reader has its own back-off
        self._publisher: Redis = Redis.from_url(
            url, socket_timeout=BUS_TIMEOUT_SECONDS, socket_connect_timeout=BUS_TIMEOUT_SECONDS, retry=retry
        )
        self._subscriber: Redis = Redis.from_url(
            url, socket_connect_timeout=BUS_TIMEOUT_SECONDS, socket_timeout=None, retry=retry
        )
        # Messages that do not fit are dropped, because their events can be read from the log.
        self._inbox: asyncio.Queue[tuple[int, Published]] = asyncio.Queue(INBOX_MESSAGES)
        self._inbox_bytes = 0
        self._reader: asyncio.Task[None] | None = None
        self._again = asyncio.Event()
        self._rejected = 0  # the number of messages rejected since the last log line
        self._silent_until = 0.0

    async def connect(self) -> None:
        """Do nothing: the reader connects, so that the service also starts without Redis."""

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
        """Drop the current connection and subscribe again."""
        self._again.set()

    async def publish(self, channel: str, message: Message) -> None:
        sign = self._signer.sign
        if isinstance(message, Heartbeat):
            await self._publisher.publish(channel, sign(_encode_heartbeat(message)))
            return
        if isinstance(message, Nudge):
            await self._publisher.publish(channel, sign(orjson.dumps({"nudge": message.topic})))
            return
        assert not isinstance(message, Reconnected)
        pipeline = self._publisher.pipeline(transaction=False)
        for event in message:
            pipeline.publish(channel, sign(_encode_event(event)))
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
                    await asyncio.wait_for(pubsub.subscribe(channel), BUS_TIMEOUT_SECONDS)
                    self._deliver(channel, Reconnected())
                    if not is_first:
                        metrics.BUS_RECONNECTS.inc()
                    is_first = False
                    while not self._again.is_set():
                        found = await pubsub.get_message(ignore_subscribe_messages=True, timeout=HEARTBEAT_SECONDS)
                        if found is not None and found["type"] == "message":
                            self._receive(channel, found["data"])
                            backoff = MIN_BACKOFF_SECONDS
            except (RedisError, OSError, TimeoutError) as error:
                log.debug("bus connection lost", reason=str(error))
            except Exception as error:
                # The reader must continue: without it, the worker would stay deaf.
                log.error("bus reader failed", exc_info=error)
            # Jittered, so that workers do not all reconnect at the same moment.
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    def _receive(self, channel: str, data: bytes) -> None:
        try:
            message = _decode(self._signer.verify(data))
        except (ValueError, KeyError, TypeError) as error:
            self._reject(str(error))
        else:
            self._deliver(channel, message, len(data))

    def _reject(self, reason: str) -> None:
        metrics.BUS_REJECTED.inc()
        self._rejected += 1
        now = time.monotonic()
        if now >= self._silent_until:
            log.warning("bus messages rejected", count=self._rejected, reason=reason)
            self._silent_until, self._rejected = now + SECONDS_BETWEEN_LOG_LINES, 0

    def _deliver(self, channel: str, message: Message, size: int = 0) -> None:
        if self._inbox.full() or self._inbox_bytes + size > INBOX_BYTES:
            metrics.BUS_DROPPED_UNREAD.inc()
            log.debug("bus message dropped: inbox full")
            return
        self._inbox_bytes += size
        self._inbox.put_nowait((size, Published(channel, message)))  # type: ignore[arg-type]


def _encode_heartbeat(beat: Heartbeat) -> bytes:
    return orjson.dumps({"worker": beat.worker, "epoch": beat.head.epoch, "seq": beat.head.seq})


def _encode_event(event: Event) -> bytes:
    """Return a header line in JSON, followed by the unchanged bytes of `payload` and `before`."""
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
