"""Whether a client can continue after its position and, if not, the reason that the `resync` frame carries."""

from __future__ import annotations

from typing import Final

from realtime.feed.feed import Feed
from repository.engine import event_log
from repository.engine.events import Head

ANOTHER_EPOCH: Final = "another epoch"
TOO_OLD: Final = "position is older than the log"
TOO_NEW: Final = "position is newer than the log"
LOG_REPLACED: Final = "the log was replaced"


async def find_start(feed: Feed, since: Head | None) -> str | None:
    """Prepare to send the events after `since`, or after the head when `since` is None. Return None if that is possible
    and otherwise the reason why it is not. Raises Unavailable.
    """
    if since is None:
        await feed.reach_head()
        return None
    if since.epoch != feed.head.epoch:
        await feed.reach_head()  # this worker may not have noticed yet that the log was replaced
        if since.epoch != feed.head.epoch:
            return ANOTHER_EPOCH
    generation = feed.generation
    reason = await check_position(feed, since.seq)
    if reason is not None:
        await feed.reach_head()  # a client that starts over must not start before its own writes
    return LOG_REPLACED if generation != feed.generation else reason


async def check_position(feed: Feed, seq: int) -> str | None:
    """Return the reason why a client cannot continue after `seq`, or None when it can. Raises Unavailable.

    A client that was connected to another worker may be slightly ahead of this worker. The client's position is valid
    if the log has reached that position.
    """
    if seq > feed.head.seq:
        found = await event_log.head(feed.database)
        if seq > found.seq:
            return TOO_NEW
        feed.offer_head(found)
        return None
    if seq == feed.head.seq or feed.ring.after(seq, max_events=1, max_bytes=1) is not None:
        return None
    oldest = await event_log.oldest(feed.database)
    return TOO_OLD if oldest is None or oldest > seq + 1 else None
