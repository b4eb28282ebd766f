"""The bus: how committed events reach every process quickly. It may lose messages; the log has every event.

Rules:
- There is one channel, to which each process subscribes once, through `broadcaster`. `memory://` stays in the process;
  `redis://` uses `realtime.feed.redis_backend`, with signed messages.
- `publish` never waits. Events go to a bounded outbox; events that do not fit are dropped and counted, because the feed
  fills every gap from the log.
- A worker that does not hear its own heartbeats is deaf: it reads the log instead, and logs a warning.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from broadcaster import Broadcast
from redis.exceptions import RedisError

from core import metrics
from realtime.feed.bus_messages import HEARTBEAT_SECONDS, Heartbeat, Message, Nudge, Reconnected
from realtime.feed.redis_backend import RedisBackend
from realtime.feed.signer import Signer
from repository.engine.events import Event, Head

CHANNEL = "marquee.events"
OUTBOX_EVENTS = 10_000
OUTBOX_BYTES = 16 * 1024 * 1024
BATCH_EVENTS = 256
DEAF_AFTER_SECONDS = 1.5  # Three heartbeats should arrive within DEAF_AFTER_SECONDS.
RESUBSCRIBE_AFTER_SECONDS = 5.0  # A connection that is silent for RESUBSCRIBE_AFTER_SECONDS is considered half-open.

log = structlog.get_logger("bus")


class Bus:
    """One per process. `run` listens and publishes; `publish` and `nudge` may be called at any time.

    Add listeners before `run`. `on_events` receives events in any order, `on_head` receives the positions of workers,
    `on_reconnect` is called when messages may have been lost, and `on_nudge` receives a topic to read again.
    """

    def __init__(self, url: str, keys: Sequence[str]) -> None:
        """`keys` are the secret keys of a shared bus. The first one signs messages, and all of them verify messages."""
        self.is_shared = not url.startswith("memory")
        self.worker = uuid.uuid4().hex
        self.dropped = 0
        self.on_events: list[Callable[[Sequence[Event]], None]] = []
        self.on_head: list[Callable[[Head], None]] = []
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_nudge: list[Callable[[str], None]] = []
        self._redis = RedisBackend(url, Signer(keys)) if self.is_shared else None
        self._broadcast = Broadcast(backend=self._redis) if self._redis else Broadcast("memory://")
        self._outbox: deque[Event] = deque()
        self._outbox_bytes = 0
        self._nudges: dict[str, None] = {}
        self._has_messages = asyncio.Event()
        self._heard_at = time.monotonic()

    def is_deaf(self) -> bool:
        """Return whether the bus is shared and has not delivered this worker's heartbeat for DEAF_AFTER_SECONDS."""
        return self.is_shared and time.monotonic() - self._heard_at > DEAF_AFTER_SECONDS

    def publish(self, events: Sequence[Event]) -> None:
        for event in events:
            if len(self._outbox) >= OUTBOX_EVENTS or self._outbox_bytes + event.size > OUTBOX_BYTES:
                self.dropped += 1
                metrics.BUS_DROPPED_UNSENT.inc()
                continue
            self._outbox.append(event)
            self._outbox_bytes += event.size
        self._has_messages.set()

    def nudge(self, topic: str) -> None:
        """Tell every process, including this one, to read `topic` again. Equal pending nudges are merged."""
        self._nudges[topic] = None
        self._has_messages.set()

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
                    for on_head in self.on_head:
                        on_head(message.head)
                elif isinstance(message, Reconnected):
                    for on_reconnect in self.on_reconnect:
                        on_reconnect()
                elif isinstance(message, Nudge):
                    for on_nudge in self.on_nudge:
                        on_nudge(message.topic)
                else:
                    for on_events in self.on_events:
                        on_events(message)

    async def _send(self) -> None:
        while True:
            await self._has_messages.wait()
            self._has_messages.clear()
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
            log.debug("bus publish failed", events=count, reason=str(error))

    async def _beat(self, current_head: Callable[[], Head]) -> None:
        was_deaf = False
        while True:
            await self._publish(Heartbeat(self.worker, current_head()), 0)
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if self.is_deaf() != was_deaf:
                was_deaf = not was_deaf
                if was_deaf:
                    log.warning("bus heartbeats lost; reading the log instead")
                else:
                    log.info("bus heartbeats received again")
            if time.monotonic() - self._heard_at > RESUBSCRIBE_AFTER_SECONDS and self._redis is not None:
                self._redis.resubscribe()
