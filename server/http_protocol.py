"""uvicorn's HTTP protocol, with one thing more for answers that go on for hours: a way to cut the connection.

Over plain ASGI a response can only end in order, which a client that reads nothing never lets happen.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from realtime.sse.event_stream import ABORT


class MarqueeHTTPProtocol(HttpToolsProtocol):
    """Offers `ABORT` in the `extensions` of each request's scope: a function that drops the connection."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {ABORT: self.transport.abort}
