"""The limits of request heads."""

from __future__ import annotations

from collections.abc import Sequence

MAX_HEAD_BYTES = 64 * 1024  # The maximum size of the request line and the headers together.
MAX_HEADERS = 128  # The number of headers is limited, because each lookup searches all of them.
HEAD_SECONDS = 10.0  # The time that a client gets to send a request head.

Headers = Sequence[tuple[bytes, bytes]]


class BadHead(Exception):
    """A request head that is rejected although it can be parsed."""


class Unparsed:
    """Counts the bytes received since a head or a part of a body was last completed."""

    size = 0
    _piece = 0  # the size of the piece that is being parsed
    _has_progressed = False  # whether this piece has completed a head or a part of a body

    def begin(self, piece: int) -> None:
        """Note that a piece of this size is going to be parsed."""
        self._piece, self._has_progressed = piece, False

    def progress(self) -> None:
        """Note that a head or a part of a body is complete."""
        self._has_progressed = True

    def end(self) -> None:
        """Note that the piece has been parsed."""
        self.size = 0 if self._has_progressed else self.size + self._piece

    @property
    def may_be_large(self) -> bool:
        """Whether a head that ends in this piece may exceed the limit. If so, its exact size must be checked."""
        return self.size + self._piece > MAX_HEAD_BYTES


def check(target: bytes, headers: Headers) -> None:
    """Raise BadHead if a head exceeds the limits."""
    if len(target) + _size(headers) > MAX_HEAD_BYTES or len(headers) > MAX_HEADERS:
        raise BadHead


def has_body(headers: Headers) -> bool:
    """Return whether a body follows the headers."""
    return any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in headers)


def rejection(target: bytes, headers: Headers, unparsed: int) -> tuple[int, str, str]:
    """Return the status, the detail and the metric's reason for a head that is rejected.

    `unparsed` is the number of bytes that were received after the last element that could be parsed.
    """
    size = _size(headers)
    if max(len(target) + size, unparsed) > MAX_HEAD_BYTES:
        status = 414 if len(target) > size else 431
        return status, f"Expected a request line and headers of at most {MAX_HEAD_BYTES} bytes", "head_size"
    if len(headers) > MAX_HEADERS:
        return 431, f"Expected at most {MAX_HEADERS} headers", "head_size"
    if has_body(headers) and any(name == b"upgrade" for name, _ in headers):
        return 400, "Expected no Upgrade header in a request with a body; only HTTP/1.1 is available", "invalid"
    return 400, "Expected a valid HTTP/1.1 request", "invalid"


def _size(headers: Headers) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)  # 4 is for ": " and CR LF
