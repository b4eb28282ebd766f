"""An operation: one method on one path, with all that the router, the parser and the documentation know of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, TypeAdapter
from starlette.datastructures import Headers
from starlette.responses import Response

from core import filters
from core.errors import FieldProblem, Problem
from core.identity import Identity
from gateways.storage import Storage
from repository.engine.database import Database
from repository.engine.events import Head
from routes.http.limit_groups import LimitGroup, Rules
from schemas import MAX_BODY_BYTES
from services.limits.limiter import Limits
from services.limits.lockout import Lockout
from services.passwords import Passwords
from services.pictures.pool import Pictures
from services.tokens import Tokens


class EventPages(Protocol):
    """The event log in pages (`realtime.sse.replay`). The edges meet here without knowing each other."""

    async def page(self, identity: Identity | None, query: Any) -> tuple[Head, Sequence[bytes], bool]: ...


class EventStreams(Protocol):
    """The event log as responses that go on (`realtime.sse.event_stream`)."""

    def stream(self, identity: Identity | None, query: Any, last_event_id: str | None) -> Response: ...


class Outbox(Protocol):
    """Whoever sends what is in `repository.accounts.outbox` (`jobs.mailer`)."""

    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers need of the process; in the lifespan state as `services`."""

    database: Database
    tokens: Tokens
    passwords: Passwords
    outbox: Outbox
    activates_by_mail: bool  # new accounts wait for a link
    lockout: Lockout
    readiness: Callable[[], Awaitable[Mapping[str, str]]]
    openapi: Callable[[], bytes]
    storage: Storage
    pictures: Pictures
    event_pages: EventPages
    event_streams: EventStreams
    limits: Limits
    limit_rules: Rules


@dataclass(frozen=True, slots=True)
class Call:
    """A request after parsing: everything in it is valid. `identity` is set where the operation asks for one."""

    services: Services
    identity: Identity | None
    path: Any
    query: Any
    filter: filters.Filter
    body: Any
    headers: Headers
    prefix: str
    url_path: str
    query_string: str
    method: str
    raw_body: bytes
    address: str | None  # of the client
    is_socket: bool  # asked over a websocket, whose frames are JSON

    @property
    def database(self) -> Database:
        return self.services.database

    @property
    def me(self) -> Identity:
        assert self.identity is not None, "the operation is not marked signed_in"
        return self.identity


LIST_HEADERS = ("X-Total-Count", "Stream-Position", "Link")

Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """`path` holds `{names}`; `answers` maps each success status to its model, None for an empty body."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    answers: Mapping[int, Any]
    description: str = ""
    path_model: type[BaseModel] | None = None
    query_model: type[BaseModel] | None = None
    filters: Mapping[str, filters.Field] = field(default_factory=dict)
    body: TypeAdapter[Any] | None = None
    # What is wrong with the body, as it came, beyond what `body` can know; said at once with what `body` finds. It is
    # also given the body as `body` made it, None when that found something.
    check: Callable[[Services, Any, Any], Sequence[FieldProblem]] | None = None
    form: TypeAdapter[Any] | None = None  # what a body that brings a file must be: see `routes.http.uploads`
    body_schema: Any = None  # what the documentation shows when `body` only checks the outside
    max_body_bytes: int = MAX_BODY_BYTES
    body_media_types: tuple[str, ...] = ("application/json",)
    signed_in: bool = False
    looks_at_token: bool = True  # False: whoever comes here may hold an old one, and is not refused for it
    errors: tuple[int, ...] = ()
    media_type: str = "application/json"
    idempotent: bool = False  # honours Idempotency-Key
    if_match: bool = False
    if_none_match: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)  # that it reads, with what they mean
    answer_headers: tuple[str, ...] = ()
    limit_group: LimitGroup | None = None  # None: UPLOAD for forms, else READ or WRITE by the method
    other_content: Mapping[str, Any] = field(default_factory=dict)  # further media types of the success answer
    problem_page: Callable[[Problem], Response] | None = None  # tells whoever prefers pages what went wrong

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
