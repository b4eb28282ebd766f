"""Every error that this package raises on purpose.

MarqueeError
├── Refused             the server rejected this client; the client does not reconnect
│   ├── Unauthorized    the token is missing, invalid or expired: HTTP 401, close code 4501
│   ├── Forbidden       the client is not allowed to connect: HTTP 403, close code 4503
│   └── ProtocolViolation   the client or the server violated the protocol: close codes 4509, 1007, 1009
├── ServerError         the server replied to a message with an error, such as invalid_filter
├── ConnectionLost      the connection ended before the reply: the request may or may not have been carried out
├── TimedOut            no reply in time: the request may or may not have been carried out
└── ClientClosed        `close` was called
"""

from __future__ import annotations

from typing import Any


class MarqueeError(Exception):
    """The base class of all errors of this package."""


class Refused(MarqueeError):
    """The server rejected this client. `code`: the HTTP status or the close code. `detail`: the server's reason."""

    def __init__(self, code: int, detail: Any) -> None:
        super().__init__(f"the server refused the connection ({code}): {detail}")
        self.code = code
        self.detail = detail


class Unauthorized(Refused):
    """The token is missing, invalid or expired: sign in again. A token callable may raise it to end the client."""

    def __init__(self, code: int = 401, detail: Any = "there is no token") -> None:
        super().__init__(code, detail)


class Forbidden(Refused):
    """The client is not allowed to connect."""


class ProtocolViolation(Refused):
    """The client or the server violated the protocol, which is a bug in one of them."""


class ServerError(MarqueeError):
    """The server replied with an error.

    `code` is the error's code, such as `invalid_filter`. `detail` is a string or a list of problems.
    """

    def __init__(self, code: str, detail: Any) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class ConnectionLost(MarqueeError):
    """The connection ended before the reply: the server may or may not have carried out the request."""


class TimedOut(MarqueeError, TimeoutError):
    """No reply within `timeout_seconds`: the server may or may not have carried out the request."""


class ClientClosed(MarqueeError):
    """`close` was called on the client, or on the watch, view or presence."""


def refusal(code: int, detail: Any) -> Refused:
    """Return the error for an HTTP status or a close code."""
    if code in (401, 4501):
        return Unauthorized(code, detail)
    if code in (403, 4503):
        return Forbidden(code, detail)
    if code in (1007, 1009, 4509):
        return ProtocolViolation(code, detail)
    return Refused(code, detail)
