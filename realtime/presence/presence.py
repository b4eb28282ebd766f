"""Who watches which topic, over all workers, for those who ask.

Each worker counts its own sockets in memory (`enter`, `leave`) and stores the counts for the others, at most four times
a second and under a lease, so that what a killed worker leaves behind goes by itself. It reads the others' counts only
while somebody here asks: when the bus nudges it, and once a second, so it works without Redis too.

Rules:
- A socket that ended lingers for some seconds, for it may come back, here or elsewhere. What lingers keeps a number
  from falling and never makes it rise, so whoever reconnects is neither seen to leave nor counted twice.
- Each topic that is asked for has one view here. A view is replaced, never changed, and a watcher remembers the one
  it was told last: what it is sent is the difference. So state and frames always add up to the view, also for a
  socket that was full for a while.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any

import orjson
import structlog

from core.errors import Unavailable
from realtime.presence.local_counts import Seats
from repository import presence
from repository.engine.database import Database
from repository.presence import ANONYMOUS, Row

NUDGE = "presence"
INTERVAL_SECONDS = 0.25  # between two writes, and between two frames to one socket
RENEW_SECONDS = 3.0  # a third of the lease
LOOK_SECONDS = 1.0
FRESH_SECONDS = 0.25  # a crowd that asks at once shares a look
RETRY_SECONDS = 1.0
STOP_SECONDS = 2.0
LINGER_SECONDS = 5.0
MAX_ROWS_PER_WRITE = 2_000
MAX_USERS_LISTED = 1_000
MAX_USERS_PER_FRAME = 1_000

log = structlog.get_logger("presence")

# By user (ANONYMOUS for all who have not signed in): how many sockets, and the user's name. None is zero.
View = Mapping[int, tuple[int, str | None]]


def view_of(before: View | None, rows: Iterable[Row]) -> View:
    """The view after `before` (None at the first look), itself when nothing has changed. Pure."""
    view: dict[int, tuple[int, str | None]] = {}
    lingering: dict[int, tuple[int, str | None]] = {}
    for row in rows:
        if row.connections:
            known = view.get(row.user_id)
            view[row.user_id] = (known[0] + row.connections if known else row.connections), row.username
        if row.lingering:
            lingering[row.user_id] = lingering.get(row.user_id, (0, None))[0] + row.lingering, row.username
    for user_id, (more, name) in lingering.items():
        connections, name = view.get(user_id, (0, name))
        if before is None:
            number = connections or more
        else:
            number = max(connections, min(connections + more, before.get(user_id, (0, None))[0]))
        if number:
            view[user_id] = number, name
    return before if before == view else view


def count_of(view: View) -> int:
    return sum(number for number, _ in view.values())


def _person(user_id: int, connections: int, username: str | None) -> dict[str, Any]:
    return {"user_id": user_id, "username": username, "connections": connections}


def state_of(view: View, *, sees_users: bool) -> dict[str, Any]:
    """What the reply says of a topic: the true count, and the first MAX_USERS_LISTED users by id."""
    listed = sorted(user_id for user_id in view if user_id != ANONYMOUS)[:MAX_USERS_LISTED] if sees_users else []
    return {"count": count_of(view), "users": [_person(user_id, *view[user_id]) for user_id in listed]}


def changes(topic: str, before: View, after: View, *, sees_users: bool) -> list[bytes]:
    """The frames from one view to another: none when nobody came or went, several when very many did."""
    joined, left = [], []
    if sees_users:
        joined = [_person(user_id, *after[user_id]) for user_id in sorted(after.keys() - before.keys() - {ANONYMOUS})]
        gone = sorted(before.keys() - after.keys() - {ANONYMOUS})
        left = [_person(user_id, 0, before[user_id][1]) for user_id in gone]
    count = count_of(after)
    if not joined and not left and count == count_of(before):
        return []
    frames = []
    for start in range(0, max(len(joined), len(left), 1), MAX_USERS_PER_FRAME):
        part = slice(start, start + MAX_USERS_PER_FRAME)
        data = {"count": count, "joined": joined[part], "left": left[part]}
        frames.append(orjson.dumps({"operation": "presence", "topic": topic, "data": data}))
    return frames


@dataclass(slots=True, eq=False)
class _Watcher:
    topics: frozenset[str]
    sees_users: bool
    write: Callable[[bytes], None]
    is_full: Callable[[], bool]
    told: dict[str, View] = field(default_factory=dict)


def _never() -> bool:
    return False


class Presence:
    """One per process; `run` is its life. `nudge` tells all processes to look."""

    def __init__(self, database: Database, nudge: Callable[[str], None]) -> None:
        self._database = database
        self._nudge = nudge
        self._worker = uuid.uuid4().hex
        self._version = 0
        self._has_lease = False
        self._stored_at = -inf
        self._seats = Seats(LINGER_SECONDS)
        self._others: dict[str, tuple[int, dict[str, list[Row]]]] = {}
        self._looked_at = -inf
        self._must_look = False
        self._looking = asyncio.Lock()
        self._views: dict[str, View] = {}
        self._is_stale = True  # the views, since somebody's counts have changed
        self._watchers: dict[object, _Watcher] = {}
        self._asking: dict[object, _Watcher] = {}
        self._wake = asyncio.Event()

    # --- sockets

    def enter(self, topics: frozenset[str], user_id: int | None, username: str | None) -> None:
        """A socket watches these topics now."""
        for topic in topics:
            self._seats.take(topic, user_id or ANONYMOUS, username)
        self._is_stale = True
        self._wake.set()

    def leave(self, topics: frozenset[str], user_id: int | None, *, lingers: bool = True) -> None:
        """It does so no more, as the user it entered as. It does not linger when it goes on as somebody else."""
        now = asyncio.get_running_loop().time()
        for topic in topics:
            self._seats.give_up(topic, user_id or ANONYMOUS, now, lingers=lingers)
        self._is_stale = True
        self._wake.set()

    # --- those who ask

    async def watch(
        self,
        key: object,
        topics: frozenset[str],
        sees_users: bool,
        write: Callable[[bytes], None],
        is_full: Callable[[], bool] = _never,
    ) -> Mapping[str, Any]:
        """Who is there, by topic; `write` is given a frame for each change from then on, until `unwatch(key)`.

        The caller writes the reply before it lets others run. While `is_full()`, nothing is written; what was missed
        comes in one frame after that. Raises Unavailable. Cancelling is safe.
        """
        self.unwatch(key)
        watcher = self._asking[key] = _Watcher(topics, sees_users, write, is_full)
        try:
            async with self._looking:
                if asyncio.get_running_loop().time() - self._looked_at > FRESH_SECONDS:
                    await self._look()
            if self._asking.get(key) is not watcher:
                return {}  # the socket went away meanwhile
        finally:
            if self._asking.get(key) is watcher:
                del self._asking[key]
        self._watchers[key] = watcher
        self._renew_views()
        watcher.told = {topic: self._views[topic] for topic in topics}
        self._wake.set()
        return {topic: state_of(view, sees_users=sees_users) for topic, view in watcher.told.items()}

    def unwatch(self, key: object) -> None:
        """Nothing happens when nobody of this key asks."""
        self._asking.pop(key, None)
        if self._watchers.pop(key, None) is not None and not self._watchers:
            self._views, self._others = {}, {}
            self._looked_at = -inf

    def hear(self) -> None:
        """Some worker's counts have changed."""
        if self._watchers:
            self._must_look = True
            self._wake.set()

    # --- its life

    async def run(self) -> None:
        """Store, look and tell until cancelled; then what is stored is left to linger."""
        try:
            while True:
                await self._wait()
                self._wake.clear()
                pause = INTERVAL_SECONDS
                try:
                    await self._round()
                except Unavailable:
                    pause = RETRY_SECONDS
                except Exception as error:
                    log.error("presence failed", exc_info=error)
                    pause = RETRY_SECONDS
                await asyncio.sleep(pause)
        finally:
            await self._stop()

    async def _wait(self) -> None:
        """Until something is due."""
        due = [self._seats.next_end]
        if self._seats.changed:
            return
        if self._has_lease:
            due.append(self._stored_at + RENEW_SECONDS)
        if self._watchers:
            due.append(self._looked_at + LOOK_SECONDS)
        when = min(due)
        try:
            async with asyncio.timeout_at(when if when < inf else None):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _round(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._seats.next_end <= now:
            self._seats.end_lingering(now)
            self._is_stale = True
        self._tell()  # those here need not wait for the database
        await self._store(now)
        if self._watchers and (self._must_look or now - self._looked_at >= LOOK_SECONDS):
            async with self._looking:
                await self._look()
            self._tell()

    async def _stop(self) -> None:
        if not self._has_lease:
            return
        try:
            async with asyncio.timeout(STOP_SECONDS):
                # Not deleted: its sockets will be back, somewhere, in a moment.
                await presence.linger(self._database, self._worker, self._version + 1, LINGER_SECONDS)
        except (Unavailable, TimeoutError):
            pass  # the lease runs out by itself

    # --- this worker's counts, for the others

    async def _store(self, now: float) -> None:
        seats = self._seats
        if self._has_lease and not seats.is_stored and not seats.changed:
            await presence.leave(self._database, self._worker)
            self._has_lease = False
            return
        batch = list(islice(seats.changed, MAX_ROWS_PER_WRITE))
        if not batch and (not self._has_lease or now - self._stored_at < RENEW_SECONDS):
            return
        if not self._has_lease:
            # When nobody looks, this is when what the last run left behind goes.
            await self._sweep((await presence.workers(self._database)).expired)
        rows = seats.begin_storing(batch)
        if not rows and not self._has_lease:
            return
        self._version += bool(rows)
        is_new, self._has_lease = not self._has_lease, True
        try:
            is_held = await presence.store(self._database, self._worker, self._version, rows, is_new=is_new)
        except BaseException:
            seats.doubt()  # it may have been written, or not
            self._has_lease = not is_new
            raise
        if not is_held:
            log.info("presence lease lost; storing everything again")
            seats.doubt()
            self._has_lease = False
            return
        seats.end_storing(rows)
        self._stored_at = now
        if rows:
            self._nudge(NUDGE)

    async def _sweep(self, ghosts: list[str]) -> None:
        others = [ghost for ghost in ghosts if ghost != self._worker]
        if others:
            await presence.sweep(self._database, others)

    # --- all workers' counts, for those who ask here

    async def _look(self) -> None:
        now, self._must_look = asyncio.get_running_loop().time(), False
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
        self._looked_at = now
        await self._sweep(workers.expired)

    def _renew_views(self) -> None:
        watched = {topic for watcher in self._watchers.values() for topic in watcher.topics}
        if not self._is_stale and watched <= self._views.keys():
            return
        self._is_stale = False
        self._views = {topic: view_of(self._views.get(topic), self._rows(topic)) for topic in watched}

    def _rows(self, topic: str) -> Iterable[Row]:
        yield from self._seats.rows(topic)
        for _, by_topic in self._others.values():
            yield from by_topic.get(topic, ())

    def _tell(self) -> None:
        """Bring every watcher that takes frames to the present view."""
        self._renew_views()
        views = self._views
        built: dict[tuple[str, int, bool], list[bytes]] = {}
        for key, watcher in list(self._watchers.items()):
            for topic, before in watcher.told.items():
                after = views[topic]
                if before is after or self._watchers.get(key) is not watcher or watcher.is_full():
                    continue
                same = topic, id(before), watcher.sees_users
                if same not in built:
                    built[same] = changes(topic, before, after, sees_users=watcher.sees_users)
                watcher.told[topic] = after
                try:
                    for frame in built[same]:
                        watcher.write(frame)
                except Exception as error:
                    log.error("telling a socket of presence failed", exc_info=error)
                    self._watchers.pop(key, None)
