"""Validation of arguments in the call that receives them. Pure: no I/O.

If an invalid argument failed only later, when its message is sent, the failure would look like a server error,
and the message would be retried forever. The validated value is a copy, so that later changes by the caller have no
effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .events import Position
from .subscription import SubscribeOptions

MAX_MESSAGE_BYTES = 256 * 1024  # For larger messages, the server closes the socket with 1009.
NO_TOKEN_CHARACTER = re.compile(r"[^A-Za-z0-9._~+/=-]")  # RFC 6750 defines the characters that a token may contain.
HALF_PAIR = re.compile("[\ud800-\udfff]")


def text_of(message: Mapping[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def checked(message: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the server can read a message, and return a copy without an id.

    Raises TypeError for values that JSON cannot represent. Raises ValueError for NaN and infinity, for a lone
    surrogate, which is not valid Unicode, and for a message that is too large.
    """
    text = text_of({**message, "id": 2**53})
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        place = next(_half_pairs(message, ""), "the message")
        raise ValueError(f"{place}: expected Unicode, got half a surrogate pair") from error
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"expected a message of at most {MAX_MESSAGE_BYTES} bytes, got {size}")
    copy: dict[str, Any] = json.loads(text)
    del copy["id"]
    return copy


def topics_of(topics: str | Iterable[str]) -> tuple[str, ...]:
    """Return the topics as a tuple. Raises TypeError or ValueError."""
    try:
        found = (topics,) if isinstance(topics, str) else tuple(topics)
    except TypeError:
        found = ()
    if not found or not all(isinstance(topic, str) for topic in found):
        raise TypeError(f"topics: expected one topic or several, such as 'movies', got {topics!r}")
    checked({"topics": found})
    return found


def since_of(since: Position | int | str | None, epoch: str | None = None) -> Position | None:
    """Convert `since` to a `Position`. Raises TypeError or ValueError.

    `since` may be a `Position`, a string in the form of the header `Stream-Position`, or a number if `epoch` is given.
    A number alone is rejected because it could belong to another log, for example if a backup has been restored.
    """
    if epoch is not None and not isinstance(epoch, str):
        raise TypeError(f"epoch: expected a string, got {epoch!r}")
    if since is None:
        return None
    if isinstance(since, str):
        position = Position.parse(since)
    else:
        position = since if isinstance(since, Position) else Position(epoch or "", since)
    if isinstance(position.seq, bool) or not isinstance(position.seq, int):
        raise TypeError(
            f"since: expected a position, a string <epoch>:<seq>, or a number with its epoch, got {since!r}"
        )
    if position.seq < 0:
        raise ValueError(f"since: expected a number of at least 0, got {position.seq}")
    if not position.epoch:
        raise ValueError(
            f"since: expected the epoch of the log together with the number, as in since='<epoch>:{position.seq}'"
        )
    checked({"epoch": position.epoch})
    return position


def options_of(
    topics: tuple[str, ...],
    conditions: Mapping[str, Any] | None,
    q: str | None,
    *,
    snapshot: bool = False,
    bulk: str | None = None,
    deliver: str | Mapping[str, Any] | None = None,
) -> SubscribeOptions:
    """Return the options of a subscription. Raises TypeError or ValueError.

    Only types are checked; the server validates the values.
    """
    if conditions is not None and not isinstance(conditions, Mapping):
        raise TypeError(f"filter: expected a mapping such as {{'genre': 'Drama'}}, got {conditions!r}")
    if q is not None and not isinstance(q, str):
        raise TypeError(f"q: expected a string such as 'third man', got {q!r}")
    if bulk is not None and not isinstance(bulk, str):
        raise TypeError(f"bulk: expected 'items' or 'summary', got {bulk!r}")
    if deliver is not None and not isinstance(deliver, str | Mapping):
        raise TypeError(f"deliver: expected 'all' or {{'latest_every_ms': 200}}, got {deliver!r}")
    message = checked(
        {
            "topics": topics,
            "filter": None if conditions is None else dict(conditions),
            "q": q,
            "bulk": bulk,
            "deliver": dict(deliver) if isinstance(deliver, Mapping) else deliver,
        }
    )
    return SubscribeOptions(topics, message["filter"], q, snapshot, bulk, message["deliver"])


def token_of(token: object) -> str | None:
    """Return the token without surrounding whitespace, or None if nothing is left.

    Raises TypeError or ValueError, whose messages do not reveal the token.
    """
    if token is None:
        return None
    if not isinstance(token, str):
        raise TypeError(f"token: expected a string, got {type(token).__name__}")
    token = token.strip()
    if (wrong := NO_TOKEN_CHARACTER.search(token)) is not None:
        raise ValueError(
            f"token: expected letters, digits and -._~+/= only, got {wrong[0]!a} at character {wrong.start() + 1}"
        )
    return token or None


def _half_pairs(value: Any, place: str) -> Iterator[str]:
    """Yield the paths of the strings with lone surrogates, such as `body.titles[2]`."""
    if isinstance(value, str):
        if HALF_PAIR.search(value):
            yield place
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if HALF_PAIR.search(str(name)):
                yield f"a name in {place or 'the message'}"
            yield from _half_pairs(each, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _half_pairs(each, f"{place}[{index}]")
