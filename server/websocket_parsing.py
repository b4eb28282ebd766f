"""The parser of websocket handshakes and frames.

The messages to clients whose handshake is invalid repeat nothing that the client sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from websockets.datastructures import Headers
from websockets.exceptions import HeaderLineTooLong, InvalidHeader, InvalidMethod, RequestLineTooLong, TooManyHeaders
from websockets.frames import Frame, Opcode
from websockets.http11 import MAX_LINE_LENGTH, MAX_NUM_HEADERS, Request, Response
from websockets.server import ServerProtocol

_VALUES = {"Sec-WebSocket-Key": "16 bytes in base64", "Sec-WebSocket-Version": "the value 13"}


class Parser(ServerProtocol):
    """The parser of one websocket. `answers_ping` is called for each ping, and returns whether to send a pong."""

    def __init__(self, answers_ping: Callable[[], bool], **options: Any) -> None:
        super().__init__(**options)
        self._answers_ping = answers_ping

    def accept(self, request: Request) -> Response:
        """Check the handshake, and set `handshake_exc` if it is invalid.

        Always return the response that accepts the handshake. The application rejects an invalid handshake, like any
        other request: after its own checks, with its own headers, and with a line in the request log.
        """
        response = super().accept(request)
        return response if self.handshake_exc is None else Response(101, "", Headers(Date=response.headers["Date"]))

    def send_frame(self, frame: Frame) -> None:
        # The library sends pongs only in response to pings, so each pong here answers a ping.
        if frame.opcode is not Opcode.PONG or self._answers_ping():
            super().send_frame(frame)


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
