"""The identities of the connections of this process.

Rules:
- An access token is checked when a connection begins. Later changes to its session or account arrive as events of the
  log, so they reach every worker as fast as any other event.
- Rights that an event removes are lost immediately. Rights that an event grants are first confirmed in the database.
- `on_events` runs before the hub's listener: a connection that loses its rights is closed before the next event is
  written.
- When the log is replaced, every identity is checked again, because sessions may have disappeared without an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import orjson
import structlog

from core.errors import Unauthenticated, Unavailable
from core.identity import Group, Identity
from repository.engine.events import Event, Head
from services.authentication import invalid_access_token

RETRY_SECONDS = 1.0

log = structlog.get_logger("registry")

# A callback that receives the current identity, or None when the identity is no longer valid.
OnChange = Callable[[Identity | None], None]


@dataclass(eq=False, slots=True)
class Entry:
    """The identity of one signed-in connection."""

    identity: Identity
    on_change: OnChange
    revision: int = 0  # the number of changes; a check that began before the latest change is out of date
    is_valid: bool = True


class Registry:
    """One per process. `on_events` and `on_reset` are listeners of the feed."""

    def __init__(self, recheck: Callable[[Identity], Awaitable[Identity]]) -> None:
        self._recheck = recheck
        self._by_user: dict[int, set[Entry]] = {}
        self._rechecking: asyncio.Task[None] | None = None
        self._confirming: dict[Entry, asyncio.Task[None]] = {}

    def close(self) -> None:
        """Stop checking identities."""
        for task in (self._rechecking, *self._confirming.values()):
            if task is not None:
                task.cancel()

    # --- identities

    def add(self, identity: Identity, on_change: OnChange) -> Entry:
        """Watch an identity until `discard`. `on_change` is called when the identity changes; it must not block."""
        entry = Entry(identity, on_change)
        self._by_user.setdefault(identity.user_id, set()).add(entry)
        return entry

    def discard(self, entry: Entry) -> None:
        entries = self._by_user.get(entry.identity.user_id, set())
        entries.discard(entry)
        if not entries:
            self._by_user.pop(entry.identity.user_id, None)

    async def confirm(self, entry: Entry) -> None:
        """Check the identity again after `add`. Otherwise, a change between the first check and `add` would be missed.

        Raises Unauthenticated or Unavailable.
        """
        while entry.is_valid:
            revision = entry.revision
            found = await self._recheck(entry.identity)
            if entry.revision == revision:
                if entry.is_valid:
                    self._change(entry, found)
                return
        raise invalid_access_token()

    def on_events(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.topic == "sessions" and event.operation == "delete":
                self._session_ended(event)
            elif event.topic == "users" and event.operation in ("update", "delete"):
                self._account_changed(event)

    def _session_ended(self, event: Event) -> None:
        user_id = int(event.audience.removeprefix("user:"))
        for entry in list(self._by_user.get(user_id, ())):
            if entry.identity.session_id == event.entity_id:
                self._change(entry, None)

    def _account_changed(self, event: Event) -> None:
        account = orjson.loads(event.payload)
        for entry in list(self._by_user.get(account["id"], ())):
            if event.operation == "delete" or not account["is_active"]:
                self._change(entry, None)
            elif (group := Group(account["group"])).rank > entry.identity.group.rank:
                self._confirm_soon(entry)
            else:
                self._change(entry, replace(entry.identity, group=group, username=account["username"]))

    def _confirm_soon(self, entry: Entry) -> None:
        entry.revision += 1  # a check that is in progress must run again
        if entry not in self._confirming:
            task = asyncio.create_task(self._confirm_until_known(entry), name="confirm-identity")
            self._confirming[entry] = task
            task.add_done_callback(lambda _: self._confirming.pop(entry, None))

    def _change(self, entry: Entry, identity: Identity | None) -> None:
        entry.revision += 1
        if identity is not None and identity == entry.identity:
            return
        if identity is None:
            entry.is_valid = False
            self.discard(entry)
        else:
            entry.identity = identity
        try:
            entry.on_change(identity)
        except Exception as error:
            log.error("identity change not applied", exc_info=error)

    def on_reset(self, head: Head) -> None:
        """Check every identity again, because the log was replaced, for example by a restored backup."""
        if self._rechecking is not None:
            self._rechecking.cancel()
        self._rechecking = asyncio.create_task(self._recheck_all(), name="recheck-identities")

    async def _recheck_all(self) -> None:
        for entry in [entry for entries in self._by_user.values() for entry in entries]:
            await self._confirm_until_known(entry)

    async def _confirm_until_known(self, entry: Entry) -> None:
        while entry in self._by_user.get(entry.identity.user_id, ()):
            try:
                await self.confirm(entry)
                break
            except Unauthenticated:
                self._change(entry, None)
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
