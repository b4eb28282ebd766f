"""Turn a request into a `Call`: identify the client, validate every part, and report all problems together."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args
from urllib.parse import parse_qsl

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from core import filters, scope_keys
from core.errors import (
    MAX_MEMBERS,
    MAX_PROBLEMS,
    FieldProblem,
    InvalidInput,
    Unauthenticated,
    UnsupportedMediaType,
    has_too_many_members,
    words_of,
)
from core.identity import Identity
from core.texts.suggestions import Unknown
from repository.generic import cursors
from repository.generic.cursors import Cursor, Order
from routes.http import limit_groups, queries, uploads
from routes.http.disconnects import while_connected
from routes.http.operation import Call, Operation, Services
from schemas import Body
from services import authentication
from services.limits.in_progress import Uploader

MAX_FORM_BYTES = 16 * 1024
MAX_PARAMETERS = 300
MAX_PROBLEMS_OF_ROW = 10  # At most this many problems are listed for each row of a bulk body.
SLICE_SECONDS = 0.002  # Rows are validated in slices of this duration. Other tasks can run between slices.

UNKNOWN_MEMBER = "Extra inputs are not permitted"  # as pydantic says it

IDEMPOTENCY_KEY = re.compile(r"^[\x21-\x7e]{1,255}$")
FORM_MEDIA_TYPE = "application/x-www-form-urlencoded"
WRITTEN_NUMBER = re.compile(r"^-?[0-9]+\Z")  # no cursor: these begin with a letter


async def parse(request: Request, operation: Operation, turn: AsyncExitStack | None = None) -> Call[Any, Any, Any]:
    """Return the call. Raises a Problem: 401 or 429 first, then 413 or 415, then a 422 that names every problem.

    A bulk operation runs, from the moment when its body has arrived, until its `turn` is closed.
    """
    services: Services = request.state.services
    identity = await _identify_and_count(request, operation, services)
    if operation.signed_in and identity is None:
        raise Unauthenticated("Sign in to do this: send Authorization: Bearer <token>")
    problems: list[FieldProblem] = []
    path = _validated(operation.path_model, request.path_params, "path", problems)
    query = _query(request, operation, problems)
    if operation.idempotent and not IDEMPOTENCY_KEY.match(request.headers.get("idempotency-key", "-")):
        message = "Expected 1 to 255 visible ASCII characters"
        problems.append(FieldProblem(("header", "Idempotency-Key"), message, "invalid_idempotency_key"))
    raw_body, body = b"", None
    has_waited = asyncio.Event()
    asyncio.get_running_loop().call_soon(has_waited.set)  # runs only if reading the body has to wait
    if operation.form is not None and _media_type(request) in uploads.media_types(operation.form):
        assert identity is not None, "an operation that takes a form must be marked signed_in"
        with services.pictures.receiving(_uploader(request, identity)):
            raw_body = await uploads.read_body(request, uploads.MAX_UPLOAD_BODY_BYTES)
        values = uploads.values(raw_body, _media_type(request), request.headers["content-type"], problems)
        body = _validated(operation.form, values, "body", problems) if values is not None else None
    elif turn is not None:
        assert identity is not None, "a bulk operation must be marked signed_in"
        raw_body, body = await _bulk_body(request, operation, identity, turn, problems)
    elif operation.file_media_types:
        uploads.require_media_type(request, operation.file_media_types, operation.max_body_bytes)
    elif operation.body is not None or operation.form is not None:
        raw_body = await uploads.read_body(request, operation.max_body_bytes)
        body = _body(request, operation, raw_body, problems)
    if identity is not None and has_waited.is_set():
        # The rights may have changed meanwhile. The transaction checks them, too, but can only reject the write,
        # whereas the handler needs the current rights.
        identity = await authentication.recheck(services.database, identity)
    if problems:
        problems.extend(await _problems_of_rows(request, operation, body))
        raise InvalidInput(problems)
    return Call(
        services=services,
        identity=identity,
        path=path,
        query=query.parameters,
        filter=query.filter,
        cursor=query.cursor,
        fields=query.fields,
        body=body,
        headers=request.headers,
        prefix=request.scope.get(scope_keys.PREFIX, ""),
        url_path=request.scope["path"],
        query_string=request.scope["query_string"].decode("latin-1"),
        method=request.method,
        raw_body=raw_body,
        stream=partial(uploads.stream, request, operation.max_body_bytes) if operation.file_media_types else None,
        is_socket=scope_keys.SOCKET in request.scope,
        address=request.client.host if request.client is not None else None,
    )


async def _bulk_body(
    request: Request, operation: Operation, identity: Identity, turn: AsyncExitStack, problems: list[FieldProblem]
) -> tuple[bytes, Any]:
    """Return the body of a bulk operation as sent and validated, or nothing if it has none, once it has its `turn`."""
    services: Services = request.state.services
    with ExitStack() as place:
        raw_body = b""
        if operation.body is not None:
            receiving = services.bulk.receiving(_uploader(request, identity))
            raw_body = await uploads.read_body(
                request, operation.max_body_bytes, lambda: place.enter_context(receiving)
            )
        own_turn = services.bulk.turn(identity.user_id, request.state.stopping)
        await while_connected(request, turn.enter_async_context(own_turn))
        return raw_body, _body(request, operation, raw_body, problems) if operation.body is not None else None


def _uploader(request: Request, identity: Identity) -> Uploader:
    return Uploader(identity.user_id, request.client.host if request.client is not None else None)


async def _problems_of_rows(request: Request, operation: Operation, body: Any) -> list[FieldProblem]:
    """Return the problems of the rows of a bulk body. The handler checks the rows only if everything else is valid."""
    if not isinstance(body, queries.Rows) or b"on_error=skip" in request.scope["query_string"]:
        return []
    (row_model,) = get_args(operation.body_schema)
    checked = await check_rows(row_model, body.root)
    return [problem for found in checked.invalid.values() for problem in found]


async def _identify_and_count(request: Request, operation: Operation, services: Services) -> Identity | None:
    """Return the client's identity and count the request, before the body is read, so that a rejection costs little.

    Raises Unauthenticated or TooManyRequests.
    """
    rule = services.limit_rules.get((operation.method, operation.path))
    try:
        identity = None if operation.ignores_credentials else await identify(request, services)
    except Unauthenticated:
        await limit_groups.count(request, services.limits, rule, None)
        raise
    await limit_groups.count(request, services.limits, rule, identity)
    return identity


async def identify(request: Request, services: Services) -> Identity | None:
    """Return the client's identity, or None without credentials.

    Raises Unauthenticated for invalid credentials, even if the operation requires none.
    """
    if scope_keys.SOCKET in request.scope:
        # A request over a websocket carries the socket's identity, which may have just expired or been revoked.
        known: Identity | None = request.scope[scope_keys.IDENTITY]
        if known is not None and known.expires_at <= time.time():
            raise authentication.invalid_access_token()
        return await authentication.recheck(services.database, known) if known is not None else None
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("Expected the header Authorization: Bearer <token>")
    address = request.client.host if request.client is not None else None
    return await authentication.identify(services.database, services.tokens, token.strip(), address)


def problems_of(
    error: ValidationError, model: type[BaseModel], prefix: Sequence[str | int], max_problems: int = MAX_PROBLEMS
) -> list[FieldProblem]:
    """Return one problem for each of the model's first `max_problems` validation errors, located under `prefix`."""
    found = []
    for each in error.errors(include_url=False, include_context=False, include_input=False)[:max_problems]:
        is_object = each["type"] in ("model_type", "model_attributes_type")
        message = "Expected an object" if is_object else words_of(each)
        unknown = None
        if each["type"] == "extra_forbidden" and len(each["loc"]) == 1:
            unknown = Unknown(str(each["loc"][0]), model.model_fields)
        found.append(FieldProblem((*prefix, *each["loc"]), message[:1].upper() + message[1:], each["type"], unknown))
    return found


def _validated(model: type[BaseModel] | None, value: Any, where: str, problems: list[FieldProblem]) -> Any:
    """Return the validated model, or None without a model. If `value` is invalid, add to `problems` and return None."""
    if model is None:
        return None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems.extend(problems_of(error, model, (where,)))
        return None


@dataclass(frozen=True, slots=True)
class _Query:
    """The parts of a query. `parameters` is the validated model, or None if it is invalid or there is no model."""

    parameters: Any = None
    filter: filters.Filter = filters.EVERYTHING
    cursor: Cursor | None = None
    fields: tuple[str, ...] | None = None


def _query(request: Request, operation: Operation, problems: list[FieldProblem]) -> _Query:
    model = operation.query_model
    known = frozenset(model.model_fields) if model is not None else frozenset()
    if operation.ordering is not None:
        known |= {"after"}
    if operation.members:
        known |= {"fields"}
    if operation.filters:
        known |= {"filter"}
    try:
        raw = request.scope["query_string"].decode("ascii")
        items = parse_qsl(raw, keep_blank_values=True, max_num_fields=MAX_PARAMETERS, errors="strict")
    except ValueError:
        message = f"Expected at most {MAX_PARAMETERS} parameters, in percent-encoded UTF-8"
        problems.append(FieldProblem(("query",), message, "query"))
        return _Query()
    values: dict[str, str] = {}
    for name, value in items:
        if name in known:
            if name in values and name != "sort":
                problems.append(FieldProblem(("query", name), "Expected at most once", "repeated"))
            values[name] = value
    sort: Order | None = ()
    if "sort" in values:
        values["sort"] = ",".join(value for name, value in items if name == "sort" and value)
    if "sort" in known:
        try:
            sort = queries.sorting(operation.filters, values.get("sort"))
        except queries.InvalidNames as error:
            sort = None
            problems.append(FieldProblem(("query", "sort"), str(error), "invalid_sort", error.unknown))
    cursor = _cursor(operation, values, sort, problems)
    fields = _fields(operation, values, problems)
    written = values.pop("filter", None) if operation.filters else None
    query = _validated(model, values, "query", problems)
    parsed = filters.parse_query(items, operation.filters, known)
    problems.extend(parsed.problems)
    wanted = parsed.filter
    if written is not None:
        parsed = queries.filter_of(written, operation.filters)
        problems.extend(parsed.problems)
        wanted = queries.both(wanted, parsed.filter)
    return _Query(query, wanted, cursor, fields)


def _fields(operation: Operation, values: dict[str, str], problems: list[FieldProblem]) -> tuple[str, ...] | None:
    """Take `fields` out of the values of a query, and return the members that it names, or None."""
    if not operation.members or "fields" not in values:
        return None
    try:
        return queries.selection(operation.members, values.pop("fields"))
    except queries.InvalidNames as error:
        problems.append(FieldProblem(("query", "fields"), str(error), "invalid_fields", error.unknown))
        return None


def _cursor(
    operation: Operation, values: dict[str, str], sort: Order | None, problems: list[FieldProblem]
) -> Cursor | None:
    """Take the cursor out of the values of a list's query, and return it. `sort` is None if it is invalid.

    Return None when there is no `after`, or an id, which the model of the query validates.
    """
    if operation.ordering is None or "after" not in values:
        return None
    takes_ids = operation.query_model is not None and "after" in operation.query_model.model_fields
    if takes_ids and WRITTEN_NUMBER.match(values["after"]):
        return None
    try:
        cursor = cursors.decode(values.pop("after"))
        if sort is not None:
            cursors.check(cursor, operation.ordering, sort, values.get("q", ""))
    except ValueError as error:
        expected = f"{error}, or an id" if takes_ids else str(error)
        problems.append(FieldProblem(("query", "after"), expected, "invalid_cursor"))
        return None
    return cursor


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _body(request: Request, operation: Operation, raw: bytes, problems: list[FieldProblem]) -> Any:
    media_type = _media_type(request)
    if operation.body is None or media_type not in operation.body_media_types:
        own = operation.body_media_types if operation.body is not None else ()
        expected = " or ".join((*own, *(uploads.media_types(operation.form) if operation.form is not None else ())))
        raise UnsupportedMediaType(f"Content-Type: expected {expected}")
    if media_type == FORM_MEDIA_TYPE:
        value: Any = _form(raw)
    else:
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            problems.append(FieldProblem(("body",), f"Expected JSON: {error}", "invalid_json"))
            return None
    if has_too_many_members(value, ("body",), problems):
        return None
    found: list[FieldProblem] = []
    body = _validated(operation.body, value, "body", found)
    if body is None and issubclass(operation.body, Body):
        # Pydantic checks the rules that combine several members only if each member is valid.
        found.extend(operation.body.unmet(value, found))
    if operation.check is not None:
        problems.extend(operation.check(request.state.services, value, body))
    problems.extend(found)
    return body


def _form(raw: bytes) -> dict[str, str]:
    try:
        return dict(parse_qsl(raw[:MAX_FORM_BYTES].decode(), keep_blank_values=True, max_num_fields=20))
    except ValueError:
        return {}


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """The rows of a bulk body by index: the fields of the valid rows, and the problems of the invalid rows."""

    valid: dict[int, dict[str, Any]] = field(default_factory=dict)
    invalid: dict[int, list[FieldProblem]] = field(default_factory=dict)

    def require_all(self) -> None:
        """Raise InvalidInput if any row is invalid."""
        if self.invalid:
            problems = [problem for found in self.invalid.values() for problem in found]
            raise InvalidInput(problems)


class Slices:
    """Divides long work into slices of SLICE_SECONDS."""

    def __init__(self) -> None:
        self._end = time.monotonic() + SLICE_SECONDS

    async def pause_when_due(self) -> None:
        """Let other tasks run if the slice is over, and begin the next slice."""
        if time.monotonic() >= self._end:
            await asyncio.sleep(0)
            self._end = time.monotonic() + SLICE_SECONDS


async def check_rows(
    model: type[BaseModel], rows: Sequence[Any], *, exclude_unset: bool = False, skips_invalid: bool = False
) -> CheckedRows:
    """Validate each row of a bulk body. Other tasks can run in between.

    Unless invalid rows are skipped, stop when MAX_PROBLEMS are found: no more are reported.
    """
    checked, count, slices = CheckedRows(), 0, Slices()
    for index, row in enumerate(rows):
        await slices.pause_when_due()
        found = _many_unknown(model, row, index)
        if not found:
            try:
                checked.valid[index] = model.model_validate(row).model_dump(exclude_unset=exclude_unset)
                continue
            except ValidationError as error:
                found = problems_of(error, model, ("body", index), MAX_PROBLEMS_OF_ROW)
        checked.invalid[index] = found
        count += len(found)
        if count >= MAX_PROBLEMS and not skips_invalid:
            break
    return checked


def _many_unknown(model: type[BaseModel], row: Any, index: int) -> list[FieldProblem]:
    """Return the problems of a row with so many unknown members that no other problem of the row would be reported.

    Return an empty list for other rows. Pydantic would take several times as long, because it finds all of the unknown
    members.
    """
    if not isinstance(row, dict) or not MAX_PROBLEMS_OF_ROW < len(row) <= MAX_MEMBERS:
        return []
    unknown = [name for name in row if name not in model.model_fields]
    if len(unknown) <= MAX_PROBLEMS_OF_ROW:
        return []
    return [
        FieldProblem(("body", index, name), UNKNOWN_MEMBER, "extra_forbidden", Unknown(name, model.model_fields))
        for name in unknown[:MAX_PROBLEMS_OF_ROW]
    ]
