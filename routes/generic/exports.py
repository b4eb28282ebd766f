"""The response with an export: a whole list as a file, read from the database as fast as the client takes it.

Rules:
- The response begins when the first rows have been read, so that a query that fails is an ordinary error.
- An export that cannot be finished ends with an aborted connection, without the end of the body, so that no client
  mistakes a part of the list for the whole list.
- The database encodes the rows. The next batch is read when the client has taken the previous one. The server aborts
  the connection of a client that reads nothing, which ends the transaction of the export.
"""

from __future__ import annotations

import asyncio

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core import scope_keys
from core.error_bodies import VARY
from core.errors import Unavailable
from repository.engine import event_log
from repository.engine.events import Head
from repository.generic.lists import ListRequest
from repository.transfers import exports
from repository.transfers.exports import Batch
from repository.transfers.lines import ENDS, FileOptions, Format
from resources.resource import Resource
from routes.http import rendering
from routes.http.disconnects import while_connected
from routes.http.operation import AnyCall
from services.limits.in_progress import Uploader
from services.transfers import formats

log = structlog.get_logger("transfers")


class ExportResponse(Response):
    """Reads, encodes and sends the rows of `request`. Raises TooManyRequests or Unavailable before it begins."""

    def __init__(self, resource: Resource, call: AnyCall, request: ListRequest, options: FileOptions) -> None:
        # Unlike its base class, this response has no `body`, because the size of the export is not known yet.
        self.status_code, self.background = 200, None
        self._resource = resource
        self._call = call
        self._request = request
        self._columns = request.columns or resource.columns
        self._options = options
        self._has_begun = False
        self._sent_rows = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        by = Uploader(call.identity.user_id if call.identity is not None else None, call.address)
        with call.services.transfers.exports.take(by):
            if scope["method"] == "HEAD":
                await self._begin(await event_log.head(call.database), send)
                await send({"type": "http.response.body"})
            elif not await while_connected(Request(scope, receive), self._stream(send)):
                await _abort(scope, receive)

    async def _stream(self, send: Send) -> bool:
        """Send the whole response. Return False if it cannot be finished."""
        try:
            async with exports.opened(self._call.database, self._resource, self._request, self._options) as export:
                async for batch in export.batches:
                    await self._begin(export.head, send)
                    await _write(send, await asyncio.to_thread(self._encoded, batch))
                    self._sent_rows += len(batch)
                await self._begin(export.head, send)  # of a list without rows
        except Unavailable as error:
            if not self._has_begun:
                raise
            log.warning("export cut", resource=self._resource.name, rows=self._sent_rows, reason=error.detail)
            return False
        await send({"type": "http.response.body"})
        return True

    async def _begin(self, head: Head, send: Send) -> None:
        """Send the headers and the beginning of the file, unless this was done before."""
        if self._has_begun:
            return
        self._has_begun = True
        name, format_ = self._resource.name, self._options.format
        parameters = "; charset=utf-8; header=present" if format_ is Format.CSV else ""
        self.init_headers(
            {
                "Content-Type": formats.MEDIA_TYPES[format_] + parameters,
                "Content-Disposition": f'attachment; filename="{name}.{format_}"',
                "Cache-Control": "no-store",
                "Vary": VARY,
                **rendering.position(head),
            }
        )
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _write(send, formats.head_of(self._columns, self._options))

    def _encoded(self, batch: Batch) -> bytes:
        end = ENDS[self._options.format]
        return (end.join(batch) + end).encode()


async def _write(send: Send, part: bytes) -> None:
    if part:
        await send({"type": "http.response.body", "body": part, "more_body": True})


async def _abort(scope: Scope, receive: Receive) -> None:
    """Abort the connection where the server can. Other servers close it, because the response has no end."""
    abort = (scope.get("extensions") or {}).get(scope_keys.ABORT)
    if abort is not None:
        abort()
        while (await receive())["type"] != "http.disconnect":
            pass
