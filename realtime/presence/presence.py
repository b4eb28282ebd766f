"""Who watches which topic, across all workers, for the clients that follow presence.

Each worker counts its own sockets in memory (`enter`, `leave`) and stores the counts for the other workers, at most
four times a second and under a lease, so that the counts of a killed worker expire. A worker reads the counts of the
others only while one of its clients follows presence: when the bus nudges it, and once a second, so that presence also
works without Redis.

Rules:
- A socket that ended lingers for some seconds, because its client may reconnect to this worker or another. A lingering
  socket keeps a count from falling, but never makes a count rise, so a client that reconnects is neither reported as
  gone nor counted twice.
- Each followed topic has one view in a worker. A view is replaced, never changed. Each follower keeps the view that was
  last sent to it, and the next frames carry the difference from that view. The reply and the frames thus always add up
  to the current view, even for a socket that was full for a while.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any, NamedTuple

import structlog

from core.errors import Unavailable
from realtime.presence.local_counts import LocalCounts
from realtime.wire import frames
from repository import presence
from repository.engine.database import Database
from repository.presence import ANONYMOUS, Row

NUDGE = "presence"
INTERVAL_SECONDS = 0.25  # Two writes, and two frames to one socket, are at least INTERVAL_SECONDS apart.
RENEW_SECONDS = 3.0  # The lease is three times as long as RENEW_SECONDS.
POLL_SECONDS = 1.0
FRESH_SECONDS = 0.25  # clients that begin to follow presence within FRESH_SECONDS share one read
RETRY_SECONDS = 1.0
STOP_SECONDS = 2.0
LINGER_SECONDS = 5.0
MAX_ROWS_PER_WRITE = 2_000
MAX_USERS_LISTED = 1_000
MAX_USERS_PER_FRAME = 1_000

log = structlog.get_logger("presence")


class Watching(NamedTuple):
    """The sockets of one user on one topic, and the user's name."""

    connections: int
    username: str | None


# The keys are user ids. ANONYMOUS stands for all clients that have not signed in. Users without sockets are left out.
View = Mapping[int, Watching]


def view_of(before: View | None, rows: Iterable[Row]) -> View:
    """Return the view that replaces `before` (None for the first view), or `before` itself if it is unchanged. Pure."""
    view: dict[int, Watching] = {}
    lingering: dict[int, Watching] = {}
    for row in rows:
        for counted, number in ((view, row.connections), (lingering, row.lingering)):
            if number:
                known = counted.get(row.user_id)
                counted[row.user_id] = Watching(known.connections + number if known else number, row.username)
    for user_id, (more, name) in lingering.items():
        connections, name = view.get(user_id, (0, name))
        if before is None:
            number = connections or more
        else:
            number = max(connections, min(connections + more, before.get(user_id, (0, None))[0]))
        if number:
            view[user_id] = Watching(number, name)
    return before if before == view else view


def count_of(view: View) -> int:
    return sum(number for number, _ in view.values())


def _person(user_id: int, connections: int, username: str | None) -> dict[str, Any]:
    return {"user_id": user_id, "username": username, "connections": connections}


def state_of(view: View, *, sees_users: bool) -> dict[str, Any]:
    """Return the reply about a topic: the count of all sockets, and the first MAX_USERS_LISTED users by id."""
    listed = sorted(user_id for user_id in view if user_id != ANONYMOUS)[:MAX_USERS_LISTED] if sees_users else []
    return {"count": count_of(view), "users": [_person(user_id, *view[user_id]) for user_id in listed]}


def changes(topic: str, before: View, after: View, *, sees_users: bool) -> list[bytes]:
    """Return the frames that lead from `before` to `after`. There are none if nothing visible has changed, and
    several if many users have joined or left.
    """
    joined, left = [], []
    if sees_users:
        joined = [_person(user_id, *after[user_id]) for user_id in sorted(after.keys() - before.keys() - {ANONYMOUS})]
        gone = sorted(before.keys() - after.keys() - {ANONYMOUS})
        left = [_person(user_id, 0, before[user_id][1]) for user_id in gone]
    count = count_of(after)
    if not joined and not left and count == count_of(before):
        return []
    size = MAX_USERS_PER_FRAME
    starts = range(0, max(len(joined), len(left), 1), size)
    return [frames.presence(topic, count, joined[at : at + size], left[at : at + size]) for at in starts]


@dataclass(slots=True, eq=False)
class _Follower:
    topics: frozenset[str]
    sees_users: bool
    write: Callable[[bytes], None]
    is_full: Callable[[], bool]
    sent: dict[str, View] = field(default_factory=dict)


class Presence:
    """One per process. `nudge` tells all processes that stored counts have changed; `on_nudge` receives such nudges."""

    def __init__(self, database: Database, nudge: Callable[[str], None]) -> None:
        self._database = database
        self._nudge = nudge
        self._worker = uuid.uuid4().hex
        self._version = 0
        self._has_lease = False
        self._stored_at = -inf
        self._counts = LocalCounts(LINGER_SECONDS)
        self._others: dict[str, tuple[int, dict[str, list[Row]]]] = {}  # the version and rows of every other worker
        self._polled_at = -inf
        self._must_poll = False
        self._polling = asyncio.Lock()
        self._views: dict[str, View] = {}
        self._is_stale = True  # whether counts have changed since the views were built
        self._followers: dict[object, _Follower] = {}
        self._joining: dict[object, _Follower] = {}
        self._wake = asyncio.Event()

    # --- sockets

    def enter(self, topics: frozenset[str], user_id: int | None, username: str | None) -> None:
        """Start counting a socket that watches these topics."""
        for topic in topics:
            self._counts.enter(topic, user_id or ANONYMOUS, username)
        self._is_stale = True
        self._wake.set()

    def leave(self, topics: frozenset[str], user_id: int | None, *, lingers: bool = True) -> None:
        """Note that a socket no longer watches these topics as this user. With `lingers`, it is counted for some more
        seconds; a socket that changes its user must not linger.
        """
        now = asyncio.get_running_loop().time()
        for topic in topics:
            self._counts.leave(topic, user_id or ANONYMOUS, now, lingers=lingers)
        self._is_stale = True
        self._wake.set()

    # --- clients that follow presence

    async def watch(
        self,
        key: object,
        topics: frozenset[str],
        sees_users: bool,
        write: Callable[[bytes], None],
        is_full: Callable[[], bool] = lambda: False,
    ) -> Mapping[str, Any]:
        """Return who watches each topic now, and pass the frames of each later change to `write` until `unwatch(key)`.

        The caller must write the reply before it yields to the event loop. While `is_full()` is true, nothing is
        written; the changes are merged and written afterwards. Raises Unavailable. Cancelling is safe.
        """
        self.unwatch(key)
        follower = self._joining[key] = _Follower(topics, sees_users, write, is_full)
        try:
            async with self._polling:
                if asyncio.get_running_loop().time() - self._polled_at > FRESH_SECONDS:
                    await self._poll()
            if self._joining.get(key) is not follower:
                return {}  # the socket has been closed in the meantime
        finally:
            if self._joining.get(key) is follower:
                del self._joining[key]
        self._followers[key] = follower
        self._renew_views()
        follower.sent = {topic: self._views[topic] for topic in topics}
        self._wake.set()
        return {topic: state_of(view, sees_users=sees_users) for topic, view in follower.sent.items()}

    def unwatch(self, key: object) -> None:
        """Stop sending presence to the client registered under `key`, and cancel its pending `watch`, if any."""
        self._joining.pop(key, None)
        if self._followers.pop(key, None) is not None and not self._followers:
            self._views, self._others = {}, {}
            self._polled_at = -inf

    def on_nudge(self, topic: str) -> None:
        """Read the other workers' counts soon, because some have changed."""
        if self._followers:
            self._must_poll = True
            self._wake.set()

    # --- the task

    async def run(self) -> None:
        """Store, read and send counts until cancelled. The sockets in the stored counts linger after that."""
        try:
            while True:
                await self._wait_until_due()
                self._wake.clear()
                pause = RETRY_SECONDS
                try:
                    await self._round()
                    pause = INTERVAL_SECONDS
                except Unavailable:
                    pass
                except Exception as error:
                    log.error("presence round failed", exc_info=error)
                await asyncio.sleep(pause)
        finally:
            await self._stop()

    async def _wait_until_due(self) -> None:
        due = [self._counts.next_end]
        if self._counts.changed:
            return
        if self._has_lease:
            due.append(self._stored_at + RENEW_SECONDS)
        if self._followers:
            due.append(self._polled_at + POLL_SECONDS)
        when = min(due)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(when if when < inf else None):
                await self._wake.wait()

    async def _round(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._counts.next_end <= now:
            self._counts.end_lingering(now)
            self._is_stale = True
        self._send_changes()  # this worker's own changes need not wait for the database
        await self._store(now)
        if self._followers and (self._must_poll or now - self._polled_at >= POLL_SECONDS):
            async with self._polling:
                await self._poll()
            self._send_changes()

    async def _stop(self) -> None:
        if not self._has_lease:
            return
        with suppress(Unavailable, TimeoutError):  # on failure, the lease expires by itself
            async with asyncio.timeout(STOP_SECONDS):
                # The rows are not deleted, because the clients of these sockets will soon reconnect.
                await presence.linger(self._database, self._worker, self._version + 1, LINGER_SECONDS)

    # --- this worker's counts, for the other workers

    async def _store(self, now: float) -> None:
        counts = self._counts
        if self._has_lease and not counts.is_stored and not counts.changed:
            await presence.leave(self._database, self._worker)
            self._has_lease = False
            return
        batch = list(islice(counts.changed, MAX_ROWS_PER_WRITE))
        if not batch and (not self._has_lease or now - self._stored_at < RENEW_SECONDS):
            return
        if not self._has_lease:
            # Workers without followers do not poll, so the rows of dead workers are deleted here, too.
            await self._delete_expired((await presence.workers(self._database)).expired)
        rows = counts.begin_storing(batch)
        if not rows and not self._has_lease:
            return
        self._version += bool(rows)
        is_new, self._has_lease = not self._has_lease, True
        try:
            is_held = await presence.store(self._database, self._worker, self._version, rows, is_new=is_new)
        except BaseException:
            counts.mark_all_changed()  # it is not known whether the rows were written
            self._has_lease = not is_new
            raise
        if not is_held:
            log.info("presence lease lost; storing all counts again")
            counts.mark_all_changed()
            self._has_lease = False
            return
        counts.end_storing(rows)
        self._stored_at = now
        if rows:
            self._nudge(NUDGE)

    async def _delete_expired(self, workers: list[str]) -> None:
        others = [worker for worker in workers if worker != self._worker]
        if others:
            await presence.sweep(self._database, others)

    # --- all workers' counts, for this worker's followers

    async def _poll(self) -> None:
        now, self._must_poll = asyncio.get_running_loop().time(), False
        workers = await presence.workers(self._database)
        known, others = self._others, {}
        for worker, version in workers.live.items():
            if worker == self._worker:
                continue
            others[worker] = known.get(worker, (-1, {}))
            if others[worker][0] != version:
                by_topic: dict[str, list[Row]] = {}
                for row in await presence.rows_of(self._database, worker):
                    by_topic.setdefault(row.topic, []).append(row)
                others[worker] = version, by_topic
        self._is_stale |= others != known
        self._others = others
        self._polled_at = now
        await self._delete_expired(workers.expired)

    def _renew_views(self) -> None:
        followed = {topic for follower in self._followers.values() for topic in follower.topics}
        if not self._is_stale and followed <= self._views.keys():
            return
        self._is_stale = False
        self._views = {topic: view_of(self._views.get(topic), self._rows(topic)) for topic in followed}

    def _rows(self, topic: str) -> Iterable[Row]:
        yield from self._counts.rows(topic)
        for _, by_topic in self._others.values():
            yield from by_topic.get(topic, ())

    def _send_changes(self) -> None:
        """Send the frames that lead to the current view to every follower whose socket is not full."""
        self._renew_views()
        views = self._views
        built: dict[tuple[str, int, bool], list[bytes]] = {}
        for key, follower in list(self._followers.items()):
            for topic, before in follower.sent.items():
                after = views[topic]
                if before is after or self._followers.get(key) is not follower or follower.is_full():
                    continue
                same = topic, id(before), follower.sees_users
                if same not in built:
                    built[same] = changes(topic, before, after, sees_users=follower.sees_users)
                follower.sent[topic] = after
                try:
                    for frame in built[same]:
                        follower.write(frame)
                except Exception as error:
                    log.error("presence frame not written", exc_info=error)
                    self._followers.pop(key, None)
