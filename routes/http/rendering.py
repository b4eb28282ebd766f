"""Build responses: JSON, entity tags, preconditions, idempotent writes, page headers and content negotiation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import orjson
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core import scope_keys
from core.error_bodies import JSON, VARY, encoded, prefers
from core.errors import Problem
from repository.engine.events import Head
from repository.engine.transaction import Transaction
from repository.generic import cursors, idempotency
from repository.generic.idempotency import Claim, StoredResponse
from repository.generic.lists import Listed
from repository.generic.versions import IfMatch
from routes.http.operation import AnyCall, Call
from routes.http.queries import PageQuery

MAX_LINKED_QUERY_BYTES = 2_000  # for longer queries, `Link` has only the next page, because each URL repeats the query
POSITION = "Stream-Position"
REPLAYED = "Idempotency-Replayed"
# Also matches this service's tags after a compressing proxy has changed them: nginx makes a tag weak, and Apache
# appends the encoding.
_TAG = re.compile(r'(?:W/)?"(([0-9]{1,10})-[0-9a-f]{16})(?:-[a-z]{2,8})?"')


class JSONResponse(Response):
    """A JSON response encoded with orjson. Content that is given as bytes must already be encoded."""

    media_type = JSON

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else orjson.dumps(content)


def problem_response(problem: Problem, asked: Headers) -> Response:
    """Return the response for a problem. `asked` holds the headers of the request."""
    return error_response(problem.status, problem.detail, asked, problem.headers)


def error_response(
    status: int,
    detail: str | Sequence[Mapping[str, Any]],
    asked: Headers,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
    """Return an error in the shape that all errors have, or as problem details (RFC 9457) if the client prefers them.

    `asked` holds the headers of the request, and `more` holds further members of the problem details.
    """
    body, media_type = encoded(status, detail, accept_of(asked), **more)
    response = Response(body, status, headers, media_type)
    response.headers.add_vary_header(VARY)
    return response


# --- entity tags (RFC 9110, section 8.8.3): `"<version>-<digest of the representation>"`


def tag(version: int, body: bytes) -> str:
    return f'"{version}-{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def tagged(version: int, body: bytes, status: int = 200, **headers: str) -> Response:
    """Return the response to a write: the new representation and its entity tag."""
    return Response(body, status, {"ETag": tag(version, body), **headers}, JSON)


def entity(call: AnyCall, version: int, body: bytes) -> Response:
    """Return a response with the representation and its entity tag, or a 304 if the client already has it."""
    return _unless_known(call, body, JSON, {"ETag": tag(version, body), "Cache-Control": "no-cache"})


def immutable(call: AnyCall, content: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    """Return a response with content that never changes at its URL, or a 304 if the client already has it."""
    return _unless_known(call, content, media_type, {**headers, "ETag": tag(1, content)})


def _unless_known(call: AnyCall, content: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    known = _tags(call, "if-none-match")
    if known is not None and ("*" in known or any(f'"{match[1]}"' == headers["ETag"] for match in _own(known))):
        return _NotModified(len(content), headers)
    return Response(content, 200, headers, media_type)


class _NotModified(Response):
    """A 304. Its headers are those of the whole response, which depend on the size of the body (`Compression`)."""

    def __init__(self, known_bytes: int, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=304, headers=headers)
        self._known_bytes = known_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[scope_keys.KNOWN_SIZE] = self._known_bytes
        await super().__call__(scope, receive, send)


def if_match(call: AnyCall) -> IfMatch:
    """Return the versions that `If-Match` names, or None if the header is missing or is `*`.

    Tags that do not have the form of this service's tags match no version.
    """
    wanted = _tags(call, "if-match")
    if wanted is None or "*" in wanted:
        return None
    return frozenset(int(match[2]) for match in _own(wanted))


def _tags(call: AnyCall, name: str) -> list[str] | None:
    """Return the tags in all header lines with this name, or None if there is no such line."""
    lines = call.headers.getlist(name)
    return [part.strip() for part in ",".join(lines).split(",")] if lines else None


def _own(tags: list[str]) -> list[re.Match[str]]:
    """Return the tags that have the form of this service's own tags."""
    return [match for each in tags if (match := _TAG.fullmatch(each)) is not None]


# --- idempotency


async def write_once(
    call: AnyCall, work: Callable[[Transaction], Awaitable[StoredResponse]], body: bytes | None = None
) -> Response:
    """Run `work` in one transaction and return its response. `body` stands for a body that was read in parts.

    For a request that repeats an earlier one with the same `Idempotency-Key`, return the stored response instead, with
    the header `Idempotency-Replayed`.
    Raises InvalidInput for a key that was used with a different request.
    """
    claim = claim_of(call, call.raw_body if body is None else body)
    stored = await call.write(lambda tx: idempotency.once(tx, claim, partial(work, tx), position))
    headers = dict(stored.headers)
    epoch = headers.get(POSITION, "").rpartition(":")[0]
    if call.written.position is not None and epoch != call.written.position.epoch:
        headers.pop(POSITION, None)  # the response was stored before the log was replaced
    if stored.is_replayed:
        headers[REPLAYED] = "true"
    return Response(stored.body, stored.status, headers, headers.get("content-type", JSON))


def claim_of(call: AnyCall, body: bytes) -> Claim | None:
    """Return the `Idempotency-Key` with a digest of the request, or None if the request has no key or no identity."""
    key = call.headers.get("idempotency-key")
    if key is None or call.identity is None:
        return None
    digest = hashlib.blake2b(digest_size=32)
    for part in (call.method.encode(), call.url_path.encode(), call.query_string.encode("latin-1"), body):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return Claim(call.identity.user_id, key, digest.hexdigest())


# --- the parameter `fields`


def selected(call: AnyCall, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the members of an entity that the call requests."""
    fields = call.fields
    return row if fields is None else {name: value for name, value in row.items() if name in fields}


# --- pages

PageCall = Call[object, PageQuery, object]


def page(call: PageCall, listed: Listed[dict[str, Any]]) -> Response:
    """Return one page of a list, with `X-Total-Count`, `Stream-Position` and `Link` (RFC 8288)."""
    return _page(call, listed, [selected(call, row) for row in listed.rows])


def labels_page(call: PageCall, listed: Listed[tuple[int, str]]) -> Response:
    """Return one page of labels. Each row consists of an id and a label, but the client sees only the label."""
    return _page(call, listed, [label for _, label in listed.rows])


def _page(call: PageCall, listed: Listed[Any], items: Sequence[Any]) -> Response:
    headers = {"X-Total-Count": str(listed.total), "Cache-Control": "no-cache", **position(listed.head)}
    pages = _other_pages(call, listed)
    if len(call.query_string) > MAX_LINKED_QUERY_BYTES:
        pages = {rel: url for rel, url in pages.items() if rel == "next"}
    if pages:
        headers["Link"] = ", ".join(f'<{url}>; rel="{rel}"' for rel, url in pages.items())
    return JSONResponse(orjson.dumps(items), headers=headers)


def _other_pages(call: PageCall, listed: Listed[Any]) -> Mapping[str, str]:
    """Return the URLs of the `Link` header by link relation, such as "next"."""
    limit = call.query.limit
    if limit == 0:
        return {}
    offset, cursor = call.query.start, call.cursor
    after = getattr(call.query, "after", None)
    is_full = len(listed.rows) == limit
    if after is not None and not offset and not getattr(call.query, "sort", None):
        last_id = listed.end.values[-1] if listed.end is not None else None
        return {"next": _url(call, after=last_id)} if is_full and last_id is not None else {}
    pages = {"first": _url(call, after=cursor.after if cursor is not None else after)}
    if offset > 0 and cursor is None:
        pages["prev"] = _url(call, offset=max(0, offset - limit))
    # `total` includes the rows up to the cursor or `after`.
    if is_full if cursor is not None or after is not None else offset + limit < listed.total:
        text = cursors.encode(listed.end) if listed.end is not None else None
        # If the cursor would be too long, the next page begins where this one does, and skips this page's rows.
        pages["next"] = _url(call, after=text) if text is not None else _url(call, offset=offset + limit)
    if cursor is None and after is None:
        pages["last"] = _url(call, offset=max(0, (listed.total - 1) // limit * limit))
    return pages


def position(head: Head) -> dict[str, str]:
    """Return the header with the log position that a response reflects. Clients can watch from there without a gap."""
    return {POSITION: f"{head.epoch}:{head.seq}"}


def with_position(response: Response, call: AnyCall) -> Response:
    """Add the position of the last event to the response, if the call has written anything, and return the response."""
    if call.written.position is not None and POSITION not in response.headers:
        response.headers.update(position(call.written.position))
    return response


def next_page(call: AnyCall, **changes: int | str | None) -> str:
    """Return the value of a `Link` header to the next page: the same path with a changed query.

    A parameter that is changed to None is removed.
    """
    return f'<{_url(call, **changes)}>; rel="next"'


def _url(call: AnyCall, **changes: cursors.Value) -> str:
    kept = [
        (name, value)
        for name, value in parse_qsl(call.query_string, keep_blank_values=True)
        if name not in ("offset", "skip", *changes)
    ]
    # The path has been decoded and must be quoted again, because user names in it may contain any character.
    changed = [(name, value) for name, value in changes.items() if value is not None]
    query = urlencode([*kept, *changed], safe="[],:")
    return f"{call.prefix}{quote(call.url_path)}{'?' if query else ''}{query}"


# --- content negotiation (RFC 9110, section 12.5.1)


def accept_of(headers: Headers) -> str:
    """Return the `Accept` headers of a request as one value."""
    return ",".join(headers.getlist("accept"))


def client_prefers(headers: Headers, media_type: str) -> bool:
    """Return whether the `Accept` headers of a request, taken together, prefer the media type to JSON."""
    return prefers(accept_of(headers), media_type)
