"""Client messages and the replies to them, as pydantic models; `connection.py` carries out the actions.

`parsing.py` validates messages with these models and `/asyncapi.json` publishes them, so the two cannot differ. `id`
and `action` are not part of a model, because they are read before the model is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    MISSING,
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    RootModel,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from core.errors import FieldProblem
from core.texts.suggestions import Unknown
from repository.engine.events import Head
from repository.engine.positions import POSITION, Incomplete, Written, parse_written, position_of
from resources.topics import TOPICS
from schemas import MAX_EPOCH_LENGTH, MAX_ID, WHOLE, Answer, Body, FieldError, Search, of_bounded_size

MAX_TOPICS = max(10, len(TOPICS))
MAX_TOKEN_LENGTH = 4096
MAX_PATH_LENGTH = 8192
MAX_HEADERS = 20
MAX_HEADER_LENGTH = 8192
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
        raise PydanticCustomError("repeated", "Expected each topic at most once")
    return topics


MessageId = int | Annotated[str, Field(max_length=MAX_MESSAGE_ID_LENGTH)] | None
Topic = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(TOPICS)})]
_EACH_ONCE = Field(max_length=MAX_TOPICS, json_schema_extra={"uniqueItems": True})
Topics = Annotated[list[Topic], _EACH_ONCE, AfterValidator(_unique)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=r"^[A-Za-z0-9_.-]+$")]
SINCE_FORMS = {"together": '"since": "<epoch>:<seq>"', "beside": '"since": <seq>, "epoch": "<epoch>"'}


def _position(value: Any) -> Written:
    # A number may be 0, the position before the first event. A string must contain the epoch.
    found = parse_written(value) if not (isinstance(value, str) and value.isdigit()) else None
    if found is None:
        raise PydanticCustomError(
            "invalid_since", f"Expected a position: {SINCE_FORMS['together']} or {SINCE_FORMS['beside']}"
        )
    return found


Position = Annotated[
    Any,  # the input; the validated value is a `Written`
    PlainValidator(_position),
    WHOLE,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{POSITION}$"},
                {"type": "integer", "minimum": 0, "maximum": MAX_ID},
            ]
        }
    ),
]
Epoch = Annotated[str, Field(min_length=1, max_length=MAX_EPOCH_LENGTH)]
Milliseconds = Annotated[int, Field(strict=True, ge=MIN_LATEST_MS, le=MAX_LATEST_MS), WHOLE]
# As in HTTP: a name is a token, and a value consists of visible ASCII characters, spaces and tabs.
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
    latest_every_ms: Milliseconds = Field(
        description="Send each row's state at most once in this number of milliseconds"
    )


def _deliver_tag(value: Any) -> str:
    return "latest" if isinstance(value, Mapping | Latest) else "all"


_DELIVER_TAGS = frozenset({"all", "latest"})
Deliver = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[Latest, Tag("latest")], Discriminator(_deliver_tag)
]


class Subscribe(Body):
    """Begin a subscription. The first one replaces the socket's default subscription."""

    model_config = ConfigDict(
        json_schema_extra={
            # `dependencies` is a keyword of JSON Schema draft 7, which AsyncAPI 3.0 uses.
            "dependencies": {"epoch": {"properties": {"since": {"type": "integer"}}, "required": ["since"]}},
            "if": {"properties": {"since": {"type": "integer"}}, "required": ["since"]},
            "then": {"properties": {"epoch": {"type": "string"}}, "required": ["epoch"]},
            "examples": [
                {"topics": ["movies"], "filter": {"genre": "Drama", "rating": {"gte": 50}}, "snapshot": True},
                {"topics": ["movies"], "q": "third man", "snapshot": True},
                {"topics": ["movies"], "as": "dramas", "since": "229344c6ffb9e111:41"},
                {"topics": ["movies"], "as": "dramas", "since": 41, "epoch": "229344c6ffb9e111"},
                {"topics": ["movies", "jobs"], "bulk": "summary", "deliver": {"latest_every_ms": 200}},
            ],
        }
    )

    topics: Annotated[Topics, Field(min_length=1)] | None = Field(
        default=None, description="By default, every public topic"
    )
    filter: dict[str, Any] | None = Field(
        default=None,
        description="All fields must match. `or` holds a list of groups, of which at least one must match: "
        '`{"status": "released", "or": [{"genre": "Drama"}, {"rating": {"gte": 90}}]}`',
    )
    q: Search = Field(
        default="",
        description="Only rows in which each word of this text is the beginning of a word, ignoring case and accents. "
        "Each topic must be a list that has a search",
    )
    snapshot: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="Send the current rows before the events"
    )
    epoch: Epoch | None = Field(default=None, description="The epoch that `since` belongs to, if `since` is a number")
    since: Position | None = Field(
        default=None,
        validate_default=True,
        description="Resume after this position, the last one that the client has processed: `<epoch>:<seq>`, or only "
        "the number if `epoch` is given",
    )
    bulk: Literal["items", "summary"] = "items"
    deliver: Deliver = "all"
    name: Name | None = Field(default=None, alias="as", description="The subscription's name; `s1`, `s2`, … by default")

    @field_validator("since")
    @classmethod
    def _is_complete(cls, since: Written | None, info: ValidationInfo) -> Head | None:
        if "epoch" not in info.data:
            return None  # an invalid `epoch` has been reported already
        try:
            return position_of(since, info.data["epoch"], **SINCE_FORMS)
        except Incomplete as error:
            raise PydanticCustomError(error.kind, str(error)) from error

    @property
    def position(self) -> Head | None:
        """The position to resume after, or None."""
        found: Head | None = self.since  # the validator has added the epoch
        return found


class Unsubscribe(Body):
    """End a subscription. No frame of the subscription comes after the reply."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"subscription": "s1"}]})

    subscription: Name


class Auth(Body):
    """Sign in, or replace the access token of a signed-in socket."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.…"}]})

    token: Annotated[str, Field(min_length=1, max_length=MAX_TOKEN_LENGTH)]


class Request(Body):
    """Call the REST API with the socket's identity. `/openapi.json` describes the operations."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"method": "POST", "path": "/movies", "body": {"title": "The Third Man"}}]}
    )

    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    path: Path = Field(description="Path and query, percent-encoded as in a URL")
    headers: Annotated[
        dict[HeaderName, HeaderValue], Field(max_length=MAX_HEADERS), BeforeValidator(of_bounded_size)
    ] = Field(
        default={},
        # pydantic publishes the pattern of the names as `patternProperties`, which does not exclude other names.
        json_schema_extra={"additionalProperties": False},
    )
    body: Any | MISSING = Field(default=MISSING, description="Any JSON value; if absent, the request has no body")


class Presence(Body):
    """Follow who watches these topics, and stop following any others. An empty list ends the `presence` frames."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"topics": ["movies"]}]})

    topics: Topics


class Ping(Body):
    """Check that the connection is alive."""

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
    """The subscription has begun. This reply comes before the subscription's first frame."""

    subscription: Name
    seq: int = Field(ge=0, description="The stream begins after this number: the snapshot's `seq`, `since` or the head")


class Unsubscribed(Answer):
    """The subscription has ended. No frame of the subscription comes after this reply."""

    subscription: Name


class SignedIn(Answer):
    """The socket is signed in as this user."""

    user_id: int
    group: Literal["user", "moderator", "admin"]


class Person(Answer):
    user_id: int
    username: str | None
    connections: int = Field(ge=0, description="How many of the user's sockets watch the topic")


class Watchers(Answer):
    count: int = Field(ge=0, description="How many sockets watch the topic, including anonymous ones")
    users: list[Person] = Field(description="Empty for a socket that is not signed in")


class Present(RootModel[dict[Topic, Watchers]]):
    """Who watches each topic now. `presence` frames carry the changes."""


class Pong(Answer):
    """The connection is alive."""


Data = TypeVar("Data")


class Reply(Answer, Generic[Data]):
    """The reply to a message that succeeded."""

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
        "too_many_conditions",
        "too_many_requests",
        "too_many_subscriptions",
        "unauthenticated",
        "unavailable",
        "unknown_action",
        "unknown_subscription",
    ] = Field(description="A stable, machine-readable code")
    detail: str | list[FieldError] = Field(description="A sentence, or a list of all problems, as in a 422 response")


class ErrorReply(Answer):
    """The reply to a message that failed."""

    reply_to: MessageId = Field(description="The `id` of the message; null when it is missing or unreadable")
    ok: Literal[False]
    error: Error


class Shortened(Answer):
    """The request was carried out, but the body of its response does not fit into a frame."""

    code: Literal["reply_too_large"]
    detail: str


class Response(Answer):
    """The response of the REST API. It may come before or after the frames that the request causes."""

    reply_to: MessageId = Field(description="The `id` of the message")
    status: int = Field(ge=200, le=599)
    headers: dict[str, str]
    body: Any = Field(description="The body as over HTTP: a string when it is not JSON, null when there is none")
    error: Shortened | MISSING = Field(default=MISSING, description="Why the body was left out")


# The model of the reply to each action. An ErrorReply may come in place of any reply.
REPLIES: Mapping[str, type[BaseModel]] = {
    "subscribe": Reply[Subscribed],
    "unsubscribe": Reply[Unsubscribed],
    "auth": Reply[SignedIn],
    "request": Response,
    "presence": Reply[Present],
    "ping": Reply[Pong],
}


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[FieldProblem]:
    """Return every problem of a message with this model, in the form of a 422 response."""
    known = [member.alias or name for name, member in model.model_fields.items()]
    found = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        is_unknown = each["type"] == "extra_forbidden" and len(each["loc"]) == 1
        unknown = Unknown(str(each["loc"][0]), known) if is_unknown else None
        found.append(FieldProblem(_place(each["loc"]), each["msg"], each["type"], unknown))
    return found


def _place(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    # pydantic adds the tag of `deliver` to the path, and `[key]` for a mapping's key. The message contains neither.
    if loc[:1] == ("deliver",) and len(loc) > 1 and loc[1] in _DELIVER_TAGS:
        loc = (loc[0], *loc[2:])
    return tuple(part for part in loc if part != "[key]")
