"""The messages to clients whose websocket handshake is invalid. They repeat nothing that the client sent."""

from __future__ import annotations

from dataclasses import dataclass

from websockets.exceptions import HeaderLineTooLong, InvalidHeader, InvalidMethod, RequestLineTooLong, TooManyHeaders
from websockets.http11 import MAX_LINE_LENGTH, MAX_NUM_HEADERS

_VALUES = {"Sec-WebSocket-Key": "16 bytes in base64", "Sec-WebSocket-Version": "the value 13"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The response to a handshake; `reason` is a label of the metric and a field of the log line."""

    status: int
    reason: str
    detail: str


def unparsed_refusal(error: Exception) -> Refusal:
    """Return the response to a handshake that `websockets` could not parse."""
    if isinstance(error, RequestLineTooLong):
        expected = f"a request line of at most {MAX_LINE_LENGTH} bytes"
        return Refusal(414, "head_size", f"Expected {expected} in a websocket handshake")
    if isinstance(error, HeaderLineTooLong | TooManyHeaders):
        expected = f"at most {MAX_NUM_HEADERS} headers of at most {MAX_LINE_LENGTH} bytes each"
        return Refusal(431, "head_size", f"Expected {expected} in a websocket handshake")
    return Refusal(400, "invalid", "Expected a websocket handshake without a body")


def handshake_problem(error: Exception) -> str:
    """Return what was expected of a handshake that `websockets` has parsed and found invalid."""
    if isinstance(error, InvalidMethod):
        return "Expected the method GET in a websocket handshake"
    if isinstance(error, InvalidHeader):
        value = _VALUES.get(error.name, "a valid value")
        return f"Expected one header {error.name} with {value} in a websocket handshake"
    return "Expected a valid websocket handshake"
