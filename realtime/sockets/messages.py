"""What a client says and what it is answered: the body of each action and the replies, as pydantic models.

`connection.py` validates with them and `/asyncapi.json` shows them, so neither can say what the other does not. `id`
and `action` stand beside a body and are read before it is known which body it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    MISSING,
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from core.errors import FieldProblem
from resources.topics import TOPICS
from schemas import MAX_ID, WHOLE, Answer, Body, FieldError

MAX_TOPICS = 10
MAX_TOKEN_LENGTH = 4096
MAX_PATH_LENGTH = 8192
MAX_HEADERS = 20
MAX_HEADER_LENGTH = 8192
MAX_EPOCH_LENGTH = 64
MAX_NAME_LENGTH = 64
MAX_MESSAGE_ID_LENGTH = 255
MIN_LATEST_MS = 50
MAX_LATEST_MS = 60_000


def _known(topic: str) -> str:
    if topic not in TOPICS:
        raise PydanticCustomError("unknown_topic", "Expected one of {topics}", {"topics": ", ".join(TOPICS)})
    return topic


def _unique(topics: list[str]) -> list[str]:
    if len(set(topics)) != len(topics):
        raise PydanticCustomError("repeated", "Expected each topic once")
    return topics


MessageId = int | Annotated[str, Field(max_length=MAX_MESSAGE_ID_LENGTH)] | None
Topic = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(TOPICS)})]
_EACH_ONCE = Field(max_length=MAX_TOPICS, json_schema_extra={"uniqueItems": True})
Topics = Annotated[list[Topic], _EACH_ONCE, AfterValidator(_unique)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=r"^[A-Za-z0-9_.-]+$")]
# A position may be 0: before the first event.
Position = Annotated[int, Field(strict=True, ge=0, le=MAX_ID), WHOLE]
Epoch = Annotated[str, Field(min_length=1, max_length=MAX_EPOCH_LENGTH)]
Milliseconds = Annotated[int, Field(strict=True, ge=MIN_LATEST_MS, le=MAX_LATEST_MS), WHOLE]
# What HTTP allows: tokens as names, visible ASCII and blanks as values; anything else is percent-encoded or refused.
HeaderName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]
HeaderValue = Annotated[str, Field(max_length=MAX_HEADER_LENGTH, pattern=r"^[\t -~]*$")]


def _is_path(path: str) -> str:
    if not (path.startswith("/") and all("!" <= letter <= "~" for letter in path)):
        raise PydanticCustomError(
            "invalid_path", "Expected a path that begins with / and is percent-encoded as in a URL"
        )
    return path


Path = Annotated[
    str,
    Field(min_length=1, max_length=MAX_PATH_LENGTH, json_schema_extra={"pattern": "^/[!-~]*$"}),
    AfterValidator(_is_path),
]


class Latest(Body):
    latest_every_ms: Milliseconds = Field(description="At most one state per entity in so many milliseconds")


def _kind_of_delivery(value: Any) -> str:
    return "latest" if isinstance(value, Mapping | Latest) else "all"


_DELIVER_TAGS = frozenset({"all", "latest"})
Deliver = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[Latest, Tag("latest")], Discriminator(_kind_of_delivery)
]


class Subscribe(Body):
    """Begin a subscription. The first one of a socket ends its default subscription."""

    model_config = ConfigDict(
        json_schema_extra={
            # JSON Schema draft 7, which AsyncAPI 3.0 means.
            "dependencies": {"epoch": ["since"]},
            "examples": [
                {"topics": ["movies"], "filter": {"genre": "Drama", "rating": {"gte": 50}}, "snapshot": True},
                {"topics": ["movies"], "as": "dramas", "since": 41, "epoch": "229344c6ffb9e111"},
                {"topics": ["movies", "jobs"], "bulk": "summary", "deliver": {"latest_every_ms": 200}},
            ],
        }
    )

    topics: Annotated[Topics, Field(min_length=1)] | None = Field(default=None, description="The public ones if absent")
    filter: dict[str, Any] | None = Field(
        default=None,
        description="Fields AND together; `or` holds a list of groups, one of which must match: "
        '`{"status": "released", "or": [{"genre": "Drama"}, {"rating": {"gte": 90}}]}`',
    )
    snapshot: Annotated[bool, Field(strict=True)] = Field(default=False, description="The rows first, then the events")
    since: Position | None = Field(default=None, description="Resume: the last number that the client has dealt with")
    epoch: Epoch | None = Field(default=None, description="With `since`: the log that the number belongs to")
    bulk: Literal["items", "summary"] = "items"
    deliver: Deliver = "all"
    name: Name | None = Field(default=None, alias="as", description="Names the subscription; else s1, s2, …")

    @field_validator("epoch")
    @classmethod
    def _belongs_to_a_number(cls, epoch: str | None, info: ValidationInfo) -> str | None:
        # A wrong `since` is not in the data, and is told already.
        if epoch is not None and info.data.get("since", 0) is None:
            raise PydanticCustomError("missing_since", "Expected since beside epoch")
        return epoch


class Unsubscribe(Body):
    """End a subscription: after the reply no frame of it comes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"subscription": "s1"}]})

    subscription: Name


class Auth(Body):
    """Sign in, or refresh the access token of a socket that has signed in."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.…"}]})

    token: Annotated[str, Field(min_length=1, max_length=MAX_TOKEN_LENGTH)]


class Request(Body):
    """Call the REST API with the socket's identity. `/openapi.json` says what there is to call."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"method": "POST", "path": "/movies", "body": {"title": "The Third Man"}}]}
    )

    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    path: Path = Field(description="With the query; percent-encoded as in a URL")
    headers: Annotated[dict[HeaderName, HeaderValue], Field(max_length=MAX_HEADERS)] = Field(
        default={},
        # pydantic writes the pattern of the names, and leaves room for others.
        json_schema_extra={"additionalProperties": False},
    )
    body: Any | MISSING = Field(default=MISSING, description="Any JSON; absent: no body")


class Presence(Body):
    """Follow who watches these topics, instead of those asked for before. An empty list ends it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"topics": ["movies"]}]})

    topics: Topics


class Ping(Body):
    """Ask whether somebody is there."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})


ACTIONS: Mapping[str, type[BaseModel]] = {
    "subscribe": Subscribe,
    "unsubscribe": Unsubscribe,
    "auth": Auth,
    "request": Request,
    "presence": Presence,
    "ping": Ping,
}


# --- replies


class Subscribed(Answer):
    """To `subscribe`, always before the first frame of the subscription."""

    subscription: Name
    seq: int = Field(ge=0, description="Where the stream begins: the snapshot's number, or `since` when it resumes")


class Unsubscribed(Answer):
    """To `unsubscribe`: no frame of it comes any more."""

    subscription: Name


class SignedIn(Answer):
    """To `auth`: the socket is this user's from now on."""

    user_id: int
    group: Literal["user", "moderator", "admin"]


class Person(Answer):
    user_id: int
    username: str | None
    connections: int = Field(ge=0, description="Sockets of theirs that watch the topic")


class Watchers(Answer):
    count: int = Field(ge=0, description="Sockets that watch the topic, those that did not sign in included")
    users: list[Person] = Field(description="Empty for a socket that did not sign in")


class Present(RootModel[dict[Topic, Watchers]]):
    """To `presence`: who watches each topic; `presence` frames tell the changes."""


class Pong(Answer):
    """To `ping`."""


Data = TypeVar("Data")


class Reply(Answer, Generic[Data]):
    """The answer to a message that could be done."""

    reply_to: MessageId = Field(description="The `id` of the message")
    ok: Literal[True]
    data: Data

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        return f"{params[0].__name__}{cls.__name__}"


class Error(Answer):
    code: Literal[
        "another_user",
        "binary_frame",
        "forbidden",
        "invalid_filter",
        "invalid_json",
        "invalid_message",
        "name_taken",
        "rate_limited",
        "too_many_requests",
        "too_many_subscriptions",
        "unauthenticated",
        "unavailable",
        "unknown_action",
        "unknown_subscription",
    ] = Field(description="Stable, for programs")
    detail: str | list[FieldError] = Field(description="A sentence, or every problem as in a 422")


class ErrorReply(Answer):
    """The answer to a message that could not be done."""

    reply_to: MessageId = Field(description="The `id` of the message; null when none could be read")
    ok: Literal[False]
    error: Error


class Shortened(Answer):
    """The request was done, and its answer does not fit into a frame."""

    code: Literal["reply_too_large"]
    detail: str


class Response(Answer):
    """The answer to `request`: what the REST API answered. It may come before or after the frames of the write."""

    reply_to: MessageId = Field(description="The `id` of the message")
    status: int = Field(ge=200, le=599)
    headers: dict[str, str]
    body: Any = Field(description="As over HTTP; a text when it is no JSON, null when there is none")
    error: Shortened | MISSING = Field(default=MISSING, description="Why there is no body, though there was one")


# By the action that is answered. An ErrorReply may come instead of each.
REPLIES: Mapping[str, type[BaseModel]] = {
    "subscribe": Reply[Subscribed],
    "unsubscribe": Reply[Unsubscribed],
    "auth": Reply[SignedIn],
    "request": Response,
    "presence": Reply[Present],
    "ping": Reply[Pong],
}


def problems_of(error: ValidationError) -> list[FieldProblem]:
    """Everything that is wrong with a body, as a 422 would list it."""
    return [
        FieldProblem(_place(each["loc"]), each["msg"], each["type"])
        for each in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _place(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    # pydantic puts the chosen branch of `deliver` and the word [key] of a mapping into the path; the message has none.
    if loc[:1] == ("deliver",) and len(loc) > 1 and loc[1] in _DELIVER_TAGS:
        loc = (loc[0], *loc[2:])
    return tuple(part for part in loc if part != "[key]")
