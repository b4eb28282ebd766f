"""Messages from the client: how many are accepted, and how a text frame is parsed and validated. Pure.

All problems of a message are reported together. The clock is a parameter of `Bucket.take`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from core.errors import CloseCode, FieldProblem, listed
from core.filters import Condition, Filter, Op, build, parse_json
from core.texts import tokens
from realtime.sockets import actions
from resources.topics import TOPIC_FIELDS, TOPIC_SEARCH

MAX_BURST_MESSAGES = 1_000
MESSAGES_PER_SECOND = 500.0  # More requests per second than the service can answer on one socket.
MAX_COUNTED_CHARACTERS = 4_096  # Longer messages cost more, so they count as one message per 4,096 characters.
MAX_REFUSED_MESSAGES = 1_000  # A client that ignores MAX_REFUSED_MESSAGES errors is disconnected.

Model = TypeVar("Model", bound=BaseModel)


@dataclass(slots=True)
class Bucket:
    """A token bucket, full at first. `refused` counts the refused messages since the bucket was last half full.

    A long message takes several tokens, and counts as that many messages.
    """

    updated_at: float
    tokens: float = float(MAX_BURST_MESSAGES)
    refused: int = 0

    def take(self, now: float, amount: int = 1) -> bool:
        """Take the tokens of one message out of the bucket. Return False when the bucket has fewer."""
        self.tokens = min(MAX_BURST_MESSAGES, self.tokens + (now - self.updated_at) * MESSAGES_PER_SECOND)
        self.updated_at = now
        if self.tokens >= MAX_BURST_MESSAGES / 2:
            self.refused = 0
        if self.tokens < amount:
            self.refused += amount
            return False
        self.tokens -= amount
        return True


def weight_of(text: str) -> int:
    """Return the number of messages that a message counts as."""
    return max(1, math.ceil(len(text) / MAX_COUNTED_CHARACTERS))


@dataclass(frozen=True, slots=True)
class Message:
    """A message whose members are not validated yet. `reply_to` is the message's `id`."""

    reply_to: int | str | None
    action: str
    members: Mapping[str, Any]


class BadMessage(Exception):
    """A message that receives an error reply. If `close` is set, the connection is closed after the reply."""

    def __init__(
        self, code: str, detail: Any, close: CloseCode | None = None, reply_to: int | str | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.close = close
        self.reply_to = reply_to


def parse_message(text: str) -> Message:
    """Read the members that every message has. Raises BadMessage."""
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadMessage("invalid_json", f"Expected a JSON object: {error}") from error
    if not isinstance(message, dict):
        raise BadMessage("invalid_message", 'Expected a JSON object such as {"id": 1, "action": "ping"}')
    reply_to = message.pop("id", None)
    if isinstance(reply_to, bool) or not isinstance(reply_to, int | str | None):
        raise BadMessage("invalid_message", "id: expected an integer or a string")
    if isinstance(reply_to, str) and len(reply_to) > actions.MAX_MESSAGE_ID_LENGTH:
        raise BadMessage("invalid_message", f"id: expected at most {actions.MAX_MESSAGE_ID_LENGTH} characters")
    action = message.pop("action", None)
    if not isinstance(action, str):
        raise BadMessage("invalid_message", "action: expected a string such as ping", reply_to=reply_to)
    return Message(reply_to, action, message)


def parse_members(model: type[Model], members: Mapping[str, Any]) -> Model:
    """Validate the members of one action. Raises BadMessage with every problem."""
    try:
        return model.model_validate(members)
    except ValidationError as error:
        raise BadMessage("invalid_message", listed(actions.problems_of(error, model))) from error


def parse_filters(value: Any, topics: tuple[str, ...], text: str = "") -> tuple[tuple[str, Filter], ...]:
    """Return the filter for each topic, or () when everything matches. Rows must also have the words of `text`.

    Raises BadMessage with every problem.
    """
    words = tokens.size_of(text)
    if not words and (value is None or value == {}):
        return ()
    found: list[tuple[str, Filter]] = []
    problems: dict[tuple[str | int, ...], FieldProblem] = {}
    for topic in sorted(topics):
        wanted, wrong = parse_json(value if value is not None else {}, TOPIC_FIELDS[topic])
        if words and topic in TOPIC_SEARCH:
            wanted = build((*wanted.all, Condition(TOPIC_SEARCH[topic], Op.SEARCH, text)), wanted.any)
        elif words:
            expected = f"Expected topics from {', '.join(TOPIC_SEARCH)}: {topic} cannot be searched"
            wrong.append(FieldProblem(("q",), expected, "not_searchable"))
        found.append((topic, wanted))
        for problem in wrong:
            problems.setdefault(problem.loc, problem)  # report a field once, however many topics have it
    if problems:
        raise BadMessage("invalid_filter", listed(problems.values()))
    return tuple(found)
