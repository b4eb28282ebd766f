"""The transport of HTTP connections. It closes a connection only when the client can receive the response."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol


class Finishing(Protocol):
    """A protocol that decides when its connection is closed."""

    is_finishing: bool

    def finish(self) -> None:
        """Close the connection once the client has had the chance to receive the response."""


class GentleTransport(asyncio.Transport):
    """A transport whose `close` calls the protocol's `finish`. Other calls go to the raw transport.

    `last_write` is the size of the latest write.
    """

    last_write = 0

    def __init__(self, raw: asyncio.Transport, protocol: Finishing) -> None:
        super().__init__()
        self._raw = raw
        self._protocol: Finishing | None = protocol
        self._is_paused = False
        self._is_full = False

    def forget_protocol(self) -> None:
        """Break the reference cycle, so that both objects are freed without waiting for a full garbage collection."""
        self._protocol = None

    def close(self) -> None:
        if self._protocol is not None:
            self._protocol.finish()
        else:
            self._raw.close()

    def is_closing(self) -> bool:
        return self._raw.is_closing() or (self._protocol is not None and self._protocol.is_finishing)

    def write(self, data: Any) -> None:
        if self._protocol is not None:  # None after the connection is lost, when uvloop would raise a RuntimeError
            self.last_write = len(data)
            self._raw.write(data)

    def abort(self) -> None:
        self._raw.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._raw.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._is_paused = True
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._is_paused = False
        if not self._is_full:
            self._raw.resume_reading()

    def set_full(self, is_full: bool) -> None:
        """Pause reading while `is_full` is True, even if uvicorn resumes reading for the body of a request."""
        if is_full == self._is_full:
            return
        self._is_full = is_full
        if is_full:
            self._raw.pause_reading()
        elif not self._is_paused:
            self._raw.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._raw.set_protocol(protocol)
