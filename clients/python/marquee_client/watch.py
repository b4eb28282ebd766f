"""A watch: the events of some topics, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from .errors import ClientClosed, MarqueeError
from .events import Event, Position, Resync, Row
from .queues import Opened, Queue
from .session import Session
from .subscription import SubscribeOptions, Subscription

# Limits on the events that wait for a slow reader. When a limit is reached, the watch pauses its subscription, and
# resumes it at the same position when the queue has shrunk to half of both limits. Meanwhile, the server's log keeps
# the events, so the socket is not blocked.
QUEUED_EVENTS = 1_000
QUEUED_CHARACTERS = 8 * 1024 * 1024


class Watch(Opened):
    """The events of some topics: each once, in order, across reconnects. For one reader only.

    A watch begins when it is iterated or entered with `async with`, and ends when the loop over it ends. It yields
    `Event` objects, and a `Resync` where events are missing because the server no longer has them.

    `position` is the position of the last item that the loop has processed. It advances when the loop requests the next
    item. If the loop ends while it processes an item, by an exception or by `break`, a watch that resumes from this
    position yields the item again.
    """

    def __init__(
        self, session: Session, begin: Callable[[], None], options: SubscribeOptions, since: Position | None
    ) -> None:
        super().__init__(begin)
        self._session = session
        self._subscription = Subscription(options, self, since)
        self._queue: Queue[Event | Resync] = Queue()
        self._sizes: deque[tuple[int, int]] = deque()  # (events, characters) of each batch in the queue
        self._characters = 0
        self.position: Position | None = since

    async def __aiter__(self) -> AsyncIterator[Event | Resync]:
        self._open()
        try:
            while (item := await self._queue.get()) is not None:
                self._account_for_read()
                yield item
                # Advance only now, so that a watch resumed after an exception in the loop repeats the item.
                if item.position is not None:
                    self.position = item.position
        finally:
            self.close()

    def close(self) -> None:
        """End the watch. Queued events remain readable. To continue later, open a watch with `since=watch.position`."""
        self._session.close(self._subscription)
        self.failed(ClientClosed("the watch is closed"))

    def _start(self) -> None:
        self._session.open(self._subscription)

    def _account_for_read(self) -> None:
        """Account for an item that left the queue. Resume the subscription if the queue is at most half full."""
        events, characters = self._sizes.popleft()
        if events > 1:
            self._sizes.appendleft((events - 1, characters))
        else:
            self._characters -= characters
        if len(self._queue.items) <= QUEUED_EVENTS // 2 and self._characters <= QUEUED_CHARACTERS // 2:
            self._session.resume(self._subscription)

    # --- the subscription

    def began(self, position: Position) -> None:
        if self.position is None:
            self.position = position
        self._ready.open()

    def take(self, events: Sequence[Event], size: int) -> None:
        self._queue.put(events)
        self._sizes.append((len(events), size))
        self._characters += size
        if len(self._queue.items) >= QUEUED_EVENTS or self._characters >= QUEUED_CHARACTERS:
            self._session.pause(self._subscription)

    def resynced(self, resync: Resync) -> None:
        self._queue.put((resync,))
        self._sizes.append((1, 0))

    def replaced(self, rows: Sequence[Row], position: Position) -> None:
        raise AssertionError("a watch does not request a snapshot")

    def failed(self, error: MarqueeError) -> None:
        self._queue.end(error)
        self._ready.fail(error)
