"""Presence: who watches a topic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ClientClosed, MarqueeError
from .queues import Opened, Queue
from .session import Session

QUEUED_CHANGES = 1_000  # beyond this limit, one change with `is_reset` per topic replaces the waiting changes


@dataclass(frozen=True, slots=True)
class Audience:
    """The watchers of a topic: the number of sockets, and the signed-in users (an anonymous client sees no users)."""

    count: int
    users: Mapping[int, Mapping[str, Any]]  # {"user_id", "username", "connections"} of each user, by user_id


@dataclass(frozen=True, slots=True)
class PresenceChange:
    """A change of presence. `is_reset`: changes were skipped (reconnect, slow reader), so read the audience again."""

    topic: str
    count: int
    joined: tuple[Mapping[str, Any], ...] = ()
    left: tuple[Mapping[str, Any], ...] = ()
    is_reset: bool = False


class Presence(Opened, Mapping[str, Audience]):
    """The audience of each topic, as the server last reported it."""

    def __init__(self, session: Session, begin: Callable[[], None], topics: tuple[str, ...]) -> None:
        super().__init__(begin)
        self.topics = topics
        self._session = session
        self._audiences: dict[str, Audience] = {}
        self._queue: Queue[PresenceChange] = Queue()

    def close(self) -> None:
        self._session.remove_presence(self)
        self.failed(ClientClosed("the presence is closed"))

    async def changes(self) -> AsyncIterator[PresenceChange]:
        """Yield joins and leaves as they happen. For one reader only."""
        self._open()
        while (change := await self._queue.get()) is not None:
            yield change

    def __aiter__(self) -> AsyncIterator[PresenceChange]:
        return self.changes()

    def __getitem__(self, topic: str) -> Audience:
        return self._audiences[topic]

    def __iter__(self) -> Iterator[str]:
        return iter(self._audiences)

    def __len__(self) -> int:
        return len(self._audiences)

    def _start(self) -> None:
        self._session.add_presence(self)

    # --- the session

    def loaded(self, state: Mapping[str, Any]) -> None:
        for topic in self.topics:
            data = state[topic]
            audience = Audience(data["count"], {user["user_id"]: user for user in data["users"]})
            if topic in self._audiences and self._audiences[topic] != audience:
                self._put(PresenceChange(topic, audience.count, is_reset=True))
            self._audiences[topic] = audience
        self._ready.open()

    def changed(self, topic: str, data: Mapping[str, Any]) -> None:
        users = dict(self._audiences[topic].users)
        joined, left = tuple(data.get("joined") or ()), tuple(data.get("left") or ())
        for user in left:
            users.pop(user["user_id"], None)
        users.update({user["user_id"]: user for user in joined})
        self._audiences[topic] = Audience(data["count"], users)
        self._put(PresenceChange(topic, data["count"], joined, left))

    def failed(self, error: MarqueeError) -> None:
        self._ready.fail(error)
        self._queue.end(error)

    def _put(self, change: PresenceChange) -> None:
        if len(self._queue.items) >= QUEUED_CHANGES:
            resets = [PresenceChange(topic, each.count, is_reset=True) for topic, each in self._audiences.items()]
            self._queue.items.clear()
            self._queue.put(resets)
        else:
            self._queue.put((change,))
