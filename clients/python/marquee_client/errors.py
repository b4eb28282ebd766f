"""Everything that this package raises on purpose.

MarqueeError
├── Refused             the server does not want this client; there will be no other attempt
│   ├── Unauthorized    no token, or one that is not good (any more): HTTP 401, close code 4501
│   ├── Forbidden       HTTP 403, close code 4503
│   └── ProtocolViolation   one side does not speak the protocol: close codes 4509, 1007, 1009
├── ServerError         the server answered a message with an error, such as invalid_filter
├── ConnectionLost      the connection ended before the answer came: it may have been done, or not
├── TimedOut            the answer did not come in time: it may have been done, or not
└── ClientClosed        `close` was called
"""

from __future__ import annotations

from typing import Any


class MarqueeError(Exception):
    """The parent of the others."""


class Refused(MarqueeError):
    """`code`: the HTTP status of the handshake, or the close code. `detail`: what the server said."""

    def __init__(self, code: int, detail: Any) -> None:
        super().__init__(f"the server refused the connection ({code}): {detail}")
        self.code = code
        self.detail = detail


class Unauthorized(Refused):
    """Sign in again. A token callable may raise it, too, to end the client."""

    def __init__(self, code: int = 401, detail: Any = "there is no token") -> None:
        super().__init__(code, detail)


class Forbidden(Refused):
    """Not allowed."""


class ProtocolViolation(Refused):
    """A defect of this client, or of the server."""


class ServerError(MarqueeError):
    """`code`: such as `invalid_filter`. `detail`: a text, or a list of problems as in a 422."""

    def __init__(self, code: str, detail: Any) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class ConnectionLost(MarqueeError):
    """Nobody knows whether the server has done what it was asked."""


class TimedOut(MarqueeError, TimeoutError):
    """No answer within `timeout_seconds`. Nobody knows whether the server has done what it was asked."""


class ClientClosed(MarqueeError):
    """Of our own accord."""


def refusal(code: int, detail: Any) -> Refused:
    """The error for an HTTP status or a close code."""
    if code in (401, 4501):
        return Unauthorized(code, detail)
    if code in (403, 4503):
        return Forbidden(code, detail)
    if code in (1007, 1009, 4509):
        return ProtocolViolation(code, detail)
    return Refused(code, detail)
