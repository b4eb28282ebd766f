"""Whether a socket may be given more data.

A socket has room while its client takes what is written. In addition, the bytes that wait for all sockets of one client
(`core.network.unsent`) have a limit: beyond it, each of these sockets continues only as its client reads.
"""

from __future__ import annotations

import asyncio

from core.network.unsent import Buffer, UnsentBytes
from realtime.wire.writer import Writer

PAUSE_SECONDS = 0.25  # the pause until a full socket checks again whether its client has read enough


class Room:
    """The room of one socket. `client` is the address or network for which the socket's bytes are counted; see
    `core.network.unsent`.

    Only one subscription of a socket may wait for room at a time: the one that holds `turn`. Only one may wait to begin
    a page: the one that holds `page_turn`, which takes `turn` afterwards.
    """

    def __init__(self, writer: Writer, unsent: UnsentBytes[Buffer] | None = None, client: str = "") -> None:
        self.turn, self.page_turn = asyncio.Lock(), asyncio.Lock()
        self.client = client
        self._writer = writer
        self._unsent = unsent if unsent is not None else UnsentBytes()
        self._largest_write = 0
        self._is_closed = False

    def buffered(self) -> int:
        """Return how many bytes the socket keeps in memory. uvloop keeps a whole write until its last byte is taken."""
        size = self._writer.buffered()
        if not size:
            self._largest_write = 0
        return max(size, self._largest_write)

    def wrote(self, size: int) -> None:
        """Note that `size` bytes have just been written to the socket."""
        self._largest_write = max(size, self._largest_write)

    def is_full(self) -> bool:
        """Return whether too many bytes wait for the client's sockets, so that the client must read first."""
        self._count(self)
        return self._unsent.is_full(self.client)

    def hold(self, buffer: Buffer) -> None:
        """Count the socket, and another buffer for the same client."""
        self._count(self)
        self._count(buffer)

    def _count(self, buffer: Buffer) -> None:
        if self._is_closed:
            self._unsent.forget(self.client, buffer)
        else:
            self._unsent.count(self.client, buffer)

    def close(self, buffer: Buffer) -> None:
        """Stop counting the socket and the other buffer, now and in the future."""
        self._is_closed = True
        self._count(self)
        self._count(buffer)
