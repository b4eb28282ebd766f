"""From a text frame to a message: everything in it validated, with all that is wrong said at once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from core.errors import CloseCode, FieldProblem
from core.filters import MAX_PROBLEMS, Filter, parse_json
from realtime.sockets import messages
from resources.topics import TOPIC_FIELDS

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Message:
    """What a client said. `reply_to` is its id."""

    reply_to: int | str | None
    action: str
    members: Mapping[str, Any]


class BadMessage(Exception):
    """Answered with an error reply and, with `close`, the end of the connection."""

    def __init__(
        self, code: str, detail: Any, close: CloseCode | None = None, reply_to: int | str | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.close = close
        self.reply_to = reply_to


def parse_message(text: str) -> Message:
    """Raises BadMessage."""
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadMessage("invalid_json", f"Expected a JSON object: {error}") from error
    if not isinstance(message, dict):
        raise BadMessage("invalid_message", 'Expected a JSON object such as {"id": 1, "action": "ping"}')
    reply_to = message.pop("id", None)
    if isinstance(reply_to, bool) or not isinstance(reply_to, int | str | None):
        raise BadMessage("invalid_message", "id: expected an integer or a text")
    if isinstance(reply_to, str) and len(reply_to) > messages.MAX_MESSAGE_ID_LENGTH:
        raise BadMessage("invalid_message", f"id: expected at most {messages.MAX_MESSAGE_ID_LENGTH} characters")
    action = message.pop("action", None)
    if not isinstance(action, str):
        raise BadMessage("invalid_message", "action: expected a text such as ping", reply_to=reply_to)
    return Message(reply_to, action, message)


def parse_members(model: type[Model], members: Mapping[str, Any]) -> Model:
    """Raises BadMessage with all that is wrong."""
    try:
        return model.model_validate(members)
    except ValidationError as error:
        raise BadMessage("invalid_message", _listed(messages.problems_of(error))) from error


def parse_filters(value: Any, topics: tuple[str, ...]) -> tuple[tuple[str, Filter], ...]:
    """The filter for each topic, nothing for one that lets everything through. Raises BadMessage."""
    if value is None or value == {}:
        return ()
    found: list[tuple[str, Filter]] = []
    problems: dict[tuple[str | int, ...], FieldProblem] = {}
    for topic in sorted(topics):
        wanted, wrong = parse_json(value, TOPIC_FIELDS[topic])
        found.append((topic, wanted))
        for problem in wrong:
            problems.setdefault(problem.loc, problem)  # the same field is wrong once, however many topics
    if problems:
        raise BadMessage("invalid_filter", _listed(problems.values()))
    return tuple(found)


def _listed(problems: Iterable[FieldProblem]) -> list[dict[str, Any]]:
    return [problem.as_dict() for problem in islice(problems, MAX_PROBLEMS)]
