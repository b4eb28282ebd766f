"""The rows of a topic, kept up to date."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

from .errors import ClientClosed, MarqueeError
from .events import Change, Event, Key, Position, Resync, Row
from .queues import Opened, Queue
from .session import Session
from .subscription import SubscribeOptions, Subscription

QUEUED_CHANGES = 10_000  # the limit of each loop over the changes; beyond it, one `reset` replaces the waiting changes


class Rows:
    """Rows by id, and the application of events to them. Pure: no I/O."""

    def __init__(self) -> None:
        self.by_id: dict[Key, Row] = {}

    def replace(self, rows: Sequence[Row]) -> None:
        self.by_id = {row["id"]: row for row in rows}

    def apply(self, events: Sequence[Event]) -> list[Change]:
        """Apply all events or none, and return the changes. A malformed event raises before any row is changed."""
        steps: list[tuple[Key, Row | None]] = []
        for event in events:
            data = event.data
            if event.operation in ("add", "update"):
                steps.append((data["id"], data))
            elif event.operation == "delete":
                steps.append((data["id"], None))
            elif event.operation in ("add_bulk", "update_bulk"):
                steps.extend((row["id"], row) for row in data["items"])
            elif event.operation == "delete_bulk":
                steps.extend((key, None) for key in data["ids"])
        changes = []
        for key, row in steps:
            old = self.by_id.get(key)
            if row is None:
                if old is not None:
                    del self.by_id[key]
                    changes.append(Change("delete", key, None, old))
            else:
                self.by_id[key] = row
                changes.append(Change("add" if old is None else "update", key, row, old))
        return changes


class View(Opened, Mapping[Key, Row]):
    """The rows of a topic by id, as of `position`. With a filter, only the rows that match the filter.

    Reading never waits and never shows part of a transaction. While the client is disconnected or a new snapshot is
    arriving, the rows remain as of the last `position`, and `is_live` is False. After an error that ends the client or
    the view, reading raises that error, because the rows would be outdated. Do not modify the rows: they belong to the
    view.
    """

    def __init__(self, session: Session, begin: Callable[[], None], options: SubscribeOptions) -> None:
        super().__init__(begin)
        self._session = session
        self._subscription = Subscription(options, self)
        self._rows = Rows()
        self._queues: list[Queue[Change]] = []
        self._error: MarqueeError | None = None
        self.position: Position | None = None

    @property
    def is_live(self) -> bool:
        """Whether the view is connected and complete, so that only events in transit can be missing."""
        return self._subscription.is_live and self._error is None

    def close(self) -> None:
        """Stop updating the view. Its rows can still be read, as of `position`."""
        self._session.close(self._subscription)
        self.failed(ClientClosed("the view is closed"))

    def changes(self) -> AsyncIterator[Change]:
        """Iterate over the changes from now on. Several loops may run concurrently.

        In a loop that is too slow, a `reset` replaces the waiting changes.
        """
        self._open()
        queue: Queue[Change] = Queue()
        if self._ready.error is not None:
            queue.end(self._ready.error)
        self._queues.append(queue)
        return self._read(queue)

    async def _read(self, queue: Queue[Change]) -> AsyncIterator[Change]:
        try:
            while (change := await queue.get()) is not None:
                yield change
        finally:
            self._queues.remove(queue)

    def __aiter__(self) -> AsyncIterator[Change]:
        return self.changes()

    def __getitem__(self, key: Key) -> Row:
        return self._readable()[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._readable())

    def __len__(self) -> int:
        return len(self._readable())

    def _readable(self) -> dict[Key, Row]:
        if self._error is not None:
            raise self._error
        return self._rows.by_id

    def _start(self) -> None:
        self._session.open(self._subscription)

    # --- the subscription

    def began(self, position: Position) -> None:
        """Do nothing: after a resume, the rows are still correct."""

    def take(self, events: Sequence[Event], size: int) -> None:
        changes = self._rows.apply(events)
        if events[-1].seq is not None:
            self.position = events[-1].position
        for queue in self._queues:
            if len(queue.items) + len(changes) > QUEUED_CHANGES:
                queue.replace(Change("reset"))
            else:
                queue.put(changes)

    def resynced(self, resync: Resync) -> None:
        """Do nothing: the rows stay until the snapshot that follows is complete."""

    def replaced(self, rows: Sequence[Row], position: Position) -> None:
        self._rows.replace(rows)
        self.position = position
        self._ready.open()
        for queue in self._queues:
            queue.replace(Change("reset"))

    def failed(self, error: MarqueeError) -> None:
        if not isinstance(error, ClientClosed):
            self._error = error
        self._ready.fail(error)
        for queue in self._queues:
            queue.end(error)
