"""Operations: a method on a path, with everything that the router, the parser and the documentation need to know.

An operation is declared on its handler, and `routes.table` lists the collections:

    operations = Operations("accounts")

    @operations.patch("/users/{id}", "Change an account", answers={200: User}, signed_in=True)
    async def edit(call: Call[ById, None, AccountPatch]) -> Response: ...

The annotation of `call` is the only place that names the models of the path, the query and the body.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypedDict, TypeVar, Unpack, get_args, get_type_hints

from pydantic import BaseModel, RootModel
from starlette.datastructures import Headers
from starlette.responses import Response

from core import filters
from core.errors import FieldProblem, Problem
from core.identity import Identity
from gateways.storage import Storage
from repository.engine.database import Database
from repository.engine.events import Head
from repository.engine.transaction import Transaction
from repository.generic.cursors import Cursor, Ordering
from routes.http.limit_groups import LimitGroup, Rules
from schemas import MAX_BODY_BYTES
from services.bulk import BulkOperations
from services.limits.limiter import Limits
from services.limits.lockout import Lockout
from services.passwords import Passwords
from services.pictures.pool import Pictures
from services.tokens import Tokens
from services.transfers.in_progress import Transfers


class EventPages(Protocol):
    """Reads pages of the event log. Implemented by `realtime.sse.replay`, which the HTTP edge must not import."""

    async def page(self, identity: Identity | None, query: Any) -> tuple[Head, Sequence[bytes], bool]: ...


class EventStreams(Protocol):
    """Responds with server-sent events. Implemented by `realtime.sse.event_stream`."""

    def stream(self, identity: Identity | None, query: Any, last_event_id: str | None) -> Response: ...


class Outbox(Protocol):
    """Sends the emails queued in `repository.accounts.outbox`. Implemented by `jobs.mailer`."""

    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """The process-wide services that handlers use. The lifespan state contains them as `services`."""

    database: Database
    tokens: Tokens
    passwords: Passwords
    outbox: Outbox
    activates_by_mail: bool  # whether a new account stays inactive until its owner uses the emailed activation URL
    lockout: Lockout
    readiness: Callable[[], Awaitable[Mapping[str, str]]]
    openapi: Callable[[], bytes]
    storage: Storage
    pictures: Pictures
    bulk: BulkOperations
    transfers: Transfers
    event_pages: EventPages
    event_streams: EventStreams
    limits: Limits
    limit_rules: Rules
    generated_rows_per_day: int | None  # The limit for one user; None without rate limits.
    ratings_require_watched: bool
    users_per_address: int  # All users from one address together have this many times the limits of one user.


PathT_co = TypeVar("PathT_co", covariant=True)
QueryT_co = TypeVar("QueryT_co", covariant=True)
BodyT_co = TypeVar("BodyT_co", covariant=True)
T = TypeVar("T")


@dataclass(slots=True)
class Written:
    """The position of the last event that a call has written, or the log's head after a write without an event."""

    position: Head | None = None

    async def note(self, position: Head) -> None:
        self.position = position


@dataclass(frozen=True, slots=True)
class Call(Generic[PathT_co, QueryT_co, BodyT_co]):
    """A parsed request: its path, query and body are valid. `identity` is None when no access token was sent."""

    services: Services
    identity: Identity | None
    path: PathT_co
    query: QueryT_co
    filter: filters.Filter
    cursor: Cursor | None  # from the parameter `after` of a list, where it is no id
    fields: tuple[str, ...] | None  # from the parameter `fields`, in the order of the entity
    body: BodyT_co
    headers: Headers
    prefix: str  # The root path, followed by `/api/v1` if the request's path has this prefix.
    url_path: str  # The request's path without the prefix.
    query_string: str
    method: str
    raw_body: bytes
    address: str | None  # The client's network address.
    stream: Callable[[], AsyncIterator[bytes]] | None  # The body of an operation with `file_media_types`, in parts.
    is_socket: bool  # Whether the request was sent over a websocket, whose frames carry only JSON and text.
    written: Written = field(default_factory=Written)

    @property
    def database(self) -> Database:
        return self.services.database

    async def write(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `Database.write` with the client as the writer. The client's rights are checked again in the transaction.

        The response carries the position of the last event as `Stream-Position`.
        """

        async def noted(tx: Transaction) -> T:
            tx.on_position.append(self.written.note)
            tx.address = self.address
            return await work(tx)

        return await self.database.write(noted, self.identity)

    @property
    def me(self) -> Identity:
        assert self.identity is not None, "expected the operation to be marked signed_in"
        return self.identity


AnyCall = Call[object, object, object]
Handler = Callable[[Call[Any, Any, Any]], Awaitable[Response]]
HandlerT = TypeVar("HandlerT", bound=Handler)


class Declare(Protocol):
    """A decorator that declares an operation on a handler and returns the handler unchanged."""

    def __call__(self, handler: HandlerT) -> HandlerT: ...


# A function that returns the problems that the body's model cannot find. It is called with the services, the body as
# sent, and the validated body (None if the body is invalid). Its problems are reported together with the model's.
BodyCheck = Callable[[Services, Any, Any], Sequence[FieldProblem]]

Answers = Mapping[int, Any]
DELETED: Answers = {204: None}
JSON_MEDIA_TYPE = "application/json"
# The media types of a PATCH whose body is one object: a JSON merge patch of an entity (RFC 7396) has the same form.
PATCH_MEDIA_TYPES = (JSON_MEDIA_TYPE, "application/merge-patch+json")
LIST_HEADERS = ("X-Total-Count", "Stream-Position", "Link")


@dataclass(frozen=True, slots=True)
class Operation:
    """`path` has parameters in braces. `answers` maps each success status to its model, or None if it has no body."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    path_model: type[BaseModel] | None
    answers: Answers
    _: KW_ONLY
    description: str = ""
    query_model: type[BaseModel] | None = None
    filters: Mapping[str, filters.Field] = field(default_factory=dict)
    members: tuple[str, ...] = ()  # the members that the parameter `fields` may name; if empty, there is no `fields`
    ordering: Ordering | None = None  # of a list, whose parameter `after` takes cursors
    body: type[BaseModel] | None = None
    check: BodyCheck | None = None
    file_media_types: tuple[str, ...] = ()  # of a body that the handler reads in parts, from `Call.stream`
    form: type[BaseModel] | None = None  # The model of a body that contains a file: see `routes.http.uploads`.
    body_schema: Any = None  # The type of the body in the documentation, if `body` validates only the outer list.
    max_body_bytes: int = MAX_BODY_BYTES
    body_media_types: tuple[str, ...] = (JSON_MEDIA_TYPE,)
    is_bulk: bool = False  # whether it waits for its turn among the bulk operations, and its body may be large
    signed_in: bool = False
    ignores_credentials: bool = False  # lets a client with a stale token get a new token
    errors: tuple[int, ...] = ()
    media_type: str = JSON_MEDIA_TYPE
    idempotent: bool = False  # whether it honours Idempotency-Key
    if_match: bool = False
    if_none_match: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)  # descriptions of request headers, by name
    answer_headers: tuple[str, ...] = ()
    limit_group: LimitGroup | None = None  # None means UPLOAD for forms, else READ or WRITE, by method.
    other_content: Mapping[str, Any] = field(default_factory=dict)  # Further media types of the success response.
    uncompressed: bool = False  # never compress the response, because it contains secrets or a picture
    document: bool = False  # the response is always the same, so compress it once
    problem_page: Callable[[Problem], Response] | None = None  # Renders problems for clients that prefer HTML.

    @property
    def counts_as(self) -> LimitGroup:
        if self.limit_group is not None:
            return self.limit_group
        if self.form is not None:
            return LimitGroup.UPLOAD
        return LimitGroup.READ if self.method == "GET" else LimitGroup.WRITE

    @property
    def is_limited(self) -> bool:
        return self.counts_as is not LimitGroup.UNLIMITED


class Details(TypedDict, total=False):
    """The optional details of a declaration. They become the fields of `Operation` with the same names.

    If the handler's annotation is a union or a base class, `body` and `query_model` name the model to validate with. If
    the annotated body is the `form`, the operation accepts no other body.
    """

    description: str
    query_model: type[BaseModel] | None
    filters: Mapping[str, filters.Field]
    members: tuple[str, ...]
    ordering: Ordering
    body: type[BaseModel] | None
    check: BodyCheck
    file_media_types: tuple[str, ...]
    form: type[BaseModel]
    body_schema: Any
    max_body_bytes: int
    body_media_types: tuple[str, ...]
    is_bulk: bool
    signed_in: bool
    ignores_credentials: bool
    errors: tuple[int, ...]
    media_type: str
    idempotent: bool
    if_match: bool
    if_none_match: bool
    headers: Mapping[str, str]
    answer_headers: tuple[str, ...]
    limit_group: LimitGroup
    other_content: Mapping[str, Any]
    uncompressed: bool
    document: bool
    problem_page: Callable[[Problem], Response]


NO_DETAILS = Details()


class Operations:
    """The operations of one module, in the order of their declarations, under one tag of the documentation.

    `like` contains the details that several declarations share; a declaration's own details take precedence.
    """

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._declared: list[Operation] = []
        self.get = partial(self._declare, "GET")
        self.post = partial(self._declare, "POST")
        self.put = partial(self._declare, "PUT")
        self.patch = partial(self._declare, "PATCH")

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._declared)

    def listing(
        self,
        path: str,
        summary: str,
        rows: Any,
        order: Ordering,
        like: Details = NO_DETAILS,
        **own: Unpack[Details],
    ) -> Declare:
        """Declare a GET that responds with `rendering.page`; `rows` is the type of the list."""
        own["ordering"] = order
        own["members"] = members_of(get_args(rows)[0])
        own["answer_headers"] = LIST_HEADERS
        return self._declare("GET", path, summary, {200: rows}, like, **own)

    def delete(
        self, path: str, summary: str, answers: Answers = DELETED, like: Details = NO_DETAILS, **own: Unpack[Details]
    ) -> Declare:
        return self._declare("DELETE", path, summary, answers, like, **own)

    def _declare(
        self, method: str, path: str, summary: str, answers: Answers, like: Details = NO_DETAILS, **own: Unpack[Details]
    ) -> Declare:
        details = like | own
        if details.get("if_none_match"):
            details["answer_headers"] = (*details.get("answer_headers", ()), "ETag")
        if method == "PATCH" and "body_schema" not in details:
            details.setdefault("body_media_types", PATCH_MEDIA_TYPES)

        def declare(handler: HandlerT) -> HandlerT:
            function = handler.func if isinstance(handler, partial) else handler
            path_type, query_type, body_type = get_args(get_type_hints(function)["call"])
            has_own_body = body_type is not details.get("form")
            details["query_model"] = _model(query_type, details.get("query_model"))
            details["body"] = _model(body_type, details.get("body")) if has_own_body else None
            path_model = _path_model(path, path_type)
            self._declared.append(Operation(method, path, handler, summary, self._tag, path_model, answers, **details))
            return handler

        return declare


def members_of(shown: Any) -> tuple[str, ...]:
    """Return the members of what a model, or a union of models, describes; none if it is not an object."""
    models = [each for each in get_args(shown) or (shown,) if issubclass(each, BaseModel)]
    models = [each for each in models if not issubclass(each, RootModel)]
    return tuple(dict.fromkeys(name for model in models for name in model.model_fields))


def _path_model(path: str, annotated: Any) -> type[BaseModel] | None:
    """Return the model of the path, or None if the annotation is `Model | None` and the path has no parameters."""
    names = set(re.findall(r"\{(\w+)\}", path))
    model = next((each for each in get_args(annotated) or (annotated,) if each is not type(None)), None)
    found: type[BaseModel] | None = model if names else None
    assert names == (set(found.model_fields) if found is not None else set()), (
        f"expected a model for {path}, got {annotated}"
    )
    return found


def _model(annotated: Any, chosen: type[BaseModel] | None) -> type[BaseModel] | None:
    """Return the annotated model, or `chosen`, which must be one of the annotated models or derived from one."""
    members = get_args(annotated) or (annotated,)
    if chosen is None:
        assert len(members) == 1, f"expected one model unless the declaration names one, got {annotated}"
        return members[0] if members[0] is not type(None) else None
    assert issubclass(chosen, members), f"expected {annotated} or a model derived from it, got {chosen}"
    return chosen
