"""The errors that the service reports, in one tree, and the codes with which it closes websockets.

MarqueeError
├── SettingsError            an invalid setting: the service does not start
└── Problem                  reported to the client: an HTTP status, or an error reply on the socket
    ├── InvalidInput         422, lists the problems
    ├── BadRequest           400
    ├── Unauthenticated      401
    ├── Forbidden            403
    ├── NotFound             404
    ├── NotAcceptable        406
    ├── RequestTimeout       408
    ├── Conflict             409
    ├── PreconditionFailed   412
    ├── ContentTooLarge      413
    ├── UnsupportedMediaType 415
    ├── MisdirectedRequest   421
    ├── UpgradeRequired      426
    ├── TooManyRequests      429
    └── Unavailable          503
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from types import MappingProxyType
from typing import Any

from core.texts.shortened import shortened
from core.texts.suggestions import Unknown


class MarqueeError(Exception):
    """The base class of all errors in this module."""


class SettingsError(MarqueeError):
    """An invalid setting. The message is a sentence that names the environment variable or the file."""


def words_of(error: Mapping[str, Any]) -> str:
    """Return the message of a pydantic error, without the prefix that pydantic adds to our own ValueErrors."""
    return str(error["msg"]).removeprefix("Value error, ")


def got(value: str) -> str:
    """Return the end of a message about an invalid value, such as `, got 'x'`.

    Return an empty string for a value that may be a URL, because a URL may contain a password.
    """
    return "" if {"@", "/"} & set(value) and ":" in value else f", got {shortened(value)!r}"


# The maximum number of problems listed for one request or message. The input may contain thousands of invalid rows.
MAX_PROBLEMS = 100
# The maximum number of different unknown names that a list of problems suggests a known name for.
MAX_SUGGESTIONS = 5
# The maximum number of characters in an error message. The longest messages list all parameters of a route and take
# about half of this length.
MAX_DETAIL_LENGTH = 2_000
# The maximum number of members of an object that a client sends, whether they are fields, conditions or operators. No
# model has half as many. A larger object is not validated, because each unknown member would be a separate problem.
MAX_MEMBERS = 50
TOO_MANY_MEMBERS = f"Expected at most {MAX_MEMBERS} members"
Loc = tuple[str | int, ...]  # the location of a problem, such as ("body", 3, "title")


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One problem in the input: its location, a message for people, and a stable machine-readable type.

    If the problem is an unknown name, `listed` can suggest a known one.
    """

    loc: Loc
    msg: str
    type: str
    unknown: Unknown | None = field(default=None, compare=False)

    def as_dict(self, suggestion: str | None = None) -> dict[str, Any]:
        # Clients choose the names of members and parameters, so a name may be very long.
        loc = [shortened(part) if isinstance(part, str) else part for part in self.loc]
        msg = self.msg if suggestion is None else f"{self.msg}. Did you mean {suggestion}?"
        return {"loc": loc, "msg": shortened(msg, MAX_DETAIL_LENGTH), "type": self.type}


# The suggestions for the unknown names of one request: by the first part of the location, and the name.
Suggestions = dict[tuple[str | int, str], str | None]


def listed(problems: Iterable[FieldProblem], suggestions: Suggestions | None = None) -> list[dict[str, Any]]:
    """Return the first MAX_PROBLEMS problems in the form that clients see, with suggestions for a few unknown names.

    `suggestions` holds those of the lists that the same response already has, and receives those of this list.
    """
    suggestions = {} if suggestions is None else suggestions
    found = []
    for problem in islice(problems, MAX_PROBLEMS):
        suggestion = None
        if problem.unknown is not None:
            key = problem.loc[0], problem.unknown.name
            if key not in suggestions and len(suggestions) < MAX_SUGGESTIONS:
                suggestions[key] = problem.unknown.nearest()
            suggestion = suggestions.get(key)
        found.append(problem.as_dict(suggestion))
    return found


def is_too_large(value: Any) -> bool:
    """Return whether `value` is an object with more than MAX_MEMBERS members."""
    return isinstance(value, dict) and len(value) > MAX_MEMBERS


def has_too_many_members(value: Any, loc: Loc, problems: list[FieldProblem]) -> bool:
    """Return whether `value` is too large. If so, add this to `problems`."""
    if is_too_large(value):
        problems.append(FieldProblem(loc, TOO_MANY_MEMBERS, "too_long"))
        return True
    return False


class Problem(MarqueeError):
    """An error that is reported to the client.

    `detail` becomes the member "detail" of the body: a sentence, or a list of field problems.
    """

    status, code = 500, "error"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, detail: str | Sequence[FieldProblem], headers: Mapping[str, str] | None = None) -> None:
        if isinstance(detail, str):
            self.detail: str | list[dict[str, Any]] = shortened(detail, MAX_DETAIL_LENGTH)
        else:
            self.detail = listed(detail)
        super().__init__(self.detail)
        if headers is not None:
            self.headers = headers


class InvalidInput(Problem):
    status, code = 422, "invalid_input"


class BadRequest(Problem):
    """The HTTP message itself is malformed."""

    status, code = 400, "bad_request"


class Unauthenticated(Problem):
    status, code = 401, "unauthenticated"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


def invalid_token(token_type: str) -> Unauthenticated:
    """Return the error for an invalid token of the type "access" or "refresh". The message omits the reason."""
    return Unauthenticated(f"The {token_type} token is not valid or has expired")


class Forbidden(Problem):
    status, code = 403, "forbidden"


class NotFound(Problem):
    status, code = 404, "not_found"


class NotAcceptable(Problem):
    status, code = 406, "not_acceptable"


class RequestTimeout(Problem):
    status, code = 408, "request_timeout"
    headers = MappingProxyType({"Connection": "close"})


class Conflict(Problem):
    """The request conflicts with stored data. Also raised for a body that refers to a row that does not exist."""

    status, code = 409, "conflict"


class PreconditionFailed(Problem):
    status, code = 412, "precondition_failed"


class ContentTooLarge(Problem):
    status, code = 413, "content_too_large"


class UnsupportedMediaType(Problem):
    status, code = 415, "unsupported_media_type"


class MisdirectedRequest(Problem):
    """The request names a host that this service does not serve."""

    status, code = 421, "misdirected_request"


class UpgradeRequired(Problem):
    status, code = 426, "upgrade_required"
    headers = MappingProxyType({"Connection": "Upgrade", "Upgrade": "websocket"})


class TooManyRequests(Problem):
    status, code = 429, "too_many_requests"

    def __init__(self, detail: str, retry_after_seconds: int) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_seconds)})


class Unavailable(Problem):
    """The service cannot handle the request now. After a write, `detail` says whether the write may have succeeded."""

    status, code = 503, "unavailable"
    headers = MappingProxyType({"Retry-After": "1"})


class CloseCode(IntEnum):
    """A code with which the service closes a websocket.

    4000–4499: reconnect and resume. 4500–4999: do not reconnect until the cause is resolved.
    The standard codes that our own code sends (RFC 6455, section 7.4.1) are listed as well.
    """

    SERVICE_RESTART = 1012
    MESSAGE_TOO_BIG = 1009
    INVALID_TEXT = 1007
    TOO_SLOW = 4008
    TOO_MANY_MESSAGES = 4429
    TOKEN_EXPIRED = 4501
    FORBIDDEN = 4503
    PROTOCOL_ERROR = 4509


# This code is reported, but never sent, for a connection that ended without a close frame (RFC 6455, section 7.4.1).
NO_CLOSE_FRAME = 1006

CLOSE_REASONS: Mapping[CloseCode, str] = {
    CloseCode.SERVICE_RESTART: "service restart: reconnect and resume",
    CloseCode.MESSAGE_TOO_BIG: "frame too big",
    CloseCode.INVALID_TEXT: "text frame is not UTF-8",
    CloseCode.TOO_SLOW: "client too slow: reconnect and resume",
    CloseCode.TOO_MANY_MESSAGES: "too many messages: reconnect later and resume",
    CloseCode.TOKEN_EXPIRED: "token expired, revoked or invalid: sign in again",
    CloseCode.FORBIDDEN: "forbidden",
    CloseCode.PROTOCOL_ERROR: "protocol error",
}
