"""The service with bounds so small that a few rows reach them.

Pages, the ring, the frames of an event and the send buffer of a socket are so small that special cases occur often:
snapshots of many pages, catching up from the ring and from the log, and intervals of `latest_every_ms` whose changes
fill several frames.
"""

from __future__ import annotations

import socket
import sys

import main
from core.settings import Settings
from realtime.fanout import encode, evaluation, hub, pulse, slices, snapshot, subscription
from realtime.feed import feed, ring
from repository.engine import transaction
from repository.generic import relations
from server import serving

KIB = 1024
SMALL = (
    (snapshot, "PAGE_ROWS", 6),
    (snapshot, "MAX_PAGE_BYTES", 8 * KIB),
    (snapshot, "MAX_UNDO_ROWS", 150),
    (subscription, "MAX_UNSENT_BYTES", 24 * KIB),
    (evaluation, "MAX_PAGES_PER_TURN", 2),
    (hub, "FLUSH_BYTES", 8 * KIB),
    (hub, "WRITES_PER_STEP", 1),
    (feed, "PAGE_EVENTS", 5),
    (feed, "PAGE_BYTES", 16 * KIB),
    (pulse, "PAGES_PER_BEAT", 3),
    (encode, "MAX_SHARED_BYTES", 16 * KIB),
    (encode, "MAX_EVENT_ITEMS", 8),
    (encode, "MAX_EVENT_BYTES", 8 * KIB),
    (transaction, "MAX_EVENT_ITEMS", 20),
    (relations, "MAX_EVENT_ITEMS", 20),
)
RING_BYTES, RING_EVENTS = 64 * KIB, 60
KERNEL_BYTES = 16 * KIB  # the size of a socket's send buffer, which can hold megabytes by default


def shrink() -> None:
    for module, name, value in SMALL:
        if not isinstance(getattr(module, name), int):
            raise TypeError(f"{module.__name__}.{name}: expected a number")
        setattr(module, name, value)
    slices.SLICE_SECONDS = 0.0  # the hub is interrupted wherever it may be
    if ring.Ring.__init__.__defaults__ != (ring.RING_BYTES, ring.RING_EVENTS):
        raise TypeError("Ring.__init__: expected RING_BYTES and RING_EVENTS as defaults")
    ring.Ring.__init__.__defaults__ = RING_BYTES, RING_EVENTS
    listen = serving.listen

    def listen_with_small_buffers(settings: Settings) -> socket.socket:
        listener = listen(settings)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)  # accepted sockets inherit this size
        return listener

    serving.listen = listen_with_small_buffers


if __name__ == "__main__":
    shrink()
    sys.exit(main.run())
