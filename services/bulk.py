"""Bulk operations: few run at a time, and few large bodies are in memory.

A bulk operation takes up to a second of the processor to validate its rows, and as long of the database to store them.
If many ran at once, each of them would take longer, and all other requests would wait for them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager

from core import metrics
from core.errors import TooManyRequests, Unavailable
from core.network.turns import Turns
from core.stopping import Stopping
from services.limits.in_progress import InProgress, Uploader

MAX_RUNNING = 2
MAX_RUNNING_PER_USER = 1
# Together with the deadline of a write, less than the 30 s after which many clients give up.
WAIT_SECONDS = 15.0
MAX_LARGE_BODIES = 16
MAX_LARGE_BODIES_PER_USER = 4
MAX_LARGE_BODIES_PER_ADDRESS = 8  # Half of them, shared by all users from one address.


class BulkOperations:
    """The bulk operations of a process. If `limits_clients` is false, only the limits of the worker hold."""

    def __init__(self, *, limits_clients: bool) -> None:
        self.turns = Turns(MAX_RUNNING, MAX_RUNNING_PER_USER if limits_clients else MAX_RUNNING)
        bodies = (MAX_LARGE_BODIES, MAX_LARGE_BODIES_PER_USER, MAX_LARGE_BODIES_PER_ADDRESS)
        self.large_bodies = InProgress("large bodies of requests in progress", *bodies, limits_clients)

    @contextmanager
    def receiving(self, by: Uploader) -> Iterator[None]:
        """Count a large body until it is parsed. Raises TooManyRequests."""
        with ExitStack() as place:
            try:
                place.enter_context(self.large_bodies.take(by))
            except TooManyRequests:
                metrics.BULK_REFUSED_BODY.inc()
                raise
            yield

    @asynccontextmanager
    async def turn(self, user_id: int, stopping: Stopping) -> AsyncIterator[None]:
        """Wait until the user may run a bulk operation, and count it until the context ends. Raises Unavailable."""
        begun = time.monotonic()
        async with AsyncExitStack() as turn:
            try:
                async with stopping.timeout(WAIT_SECONDS):
                    await turn.enter_async_context(self.turns.of(user_id))
            except TimeoutError:
                if stopping.is_stopping:
                    raise Unavailable("The service is stopping and has done nothing; send the request again") from None
                metrics.BULK_REFUSED_TURN.inc()
                message = f"Other bulk operations have been running for {WAIT_SECONDS:g} s, so nothing was done"
                raise Unavailable(f"{message}; try again later") from None
            finally:
                metrics.BULK_WAIT_SECONDS.observe(time.monotonic() - begun)
            yield
