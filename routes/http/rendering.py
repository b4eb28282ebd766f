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

from core.errors import Problem
from repository.engine.events import Head
from repository.engine.transaction import Transaction
from repository.generic import cursors, idempotency
from repository.generic.idempotency import Claim, StoredResponse
from repository.generic.lists import Listed
from repository.generic.versions import IfMatch
from routes.http.operation import AnyCall, Call
from routes.http.queries import PageQuery

JSON = "application/json"
MAX_LINKED_QUERY_BYTES = 2_000  # for longer queries, `Link` has only the next page, because each URL repeats the query
POSITION = "Stream-Position"
# Also matches this service's tags after a compressing proxy has changed them: nginx makes a tag weak, and Apache
# appends the encoding.
_TAG = re.compile(r'(?:W/)?"(([0-9]{1,10})-[0-9a-f]{16})(?:-[a-z]{2,8})?"')


class JSONResponse(Response):
    """A JSON response encoded with orjson. Content that is given as bytes must already be encoded."""

    media_type = JSON

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else orjson.dumps(content)


def problem_response(problem: Problem) -> JSONResponse:
    """Return a problem in the shape that all errors have."""
    return JSONResponse({"detail": problem.detail}, problem.status, problem.headers)


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
        return Response(status_code=304, headers=headers)
    return Response(content, 200, headers, media_type)


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


async def write_once(call: AnyCall, work: Callable[[Transaction], Awaitable[StoredResponse]]) -> Response:
    """Run `work` in one transaction and return its response.

    For a request that repeats an earlier one with the same `Idempotency-Key`, return the stored response instead.
    Raises InvalidInput for a key that was used with a different request.
    """
    claim = _claim(call)
    stored = await call.write(lambda tx: idempotency.once(tx, claim, partial(work, tx), position))
    headers = dict(stored.headers)
    epoch = headers.get(POSITION, "").rpartition(":")[0]
    if call.written.position is not None and epoch != call.written.position.epoch:
        headers.pop(POSITION, None)  # the response was stored before the log was replaced
    return Response(stored.body, stored.status, headers, headers.get("content-type", JSON))


def _claim(call: AnyCall) -> Claim | None:
    """Return the `Idempotency-Key` with a digest of the request, or None if the request has no key or no identity."""
    key = call.headers.get("idempotency-key")
    if key is None or call.identity is None:
        return None
    digest = hashlib.blake2b(digest_size=32)
    for part in (call.method.encode(), call.url_path.encode(), call.query_string.encode("latin-1"), call.raw_body):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return Claim(call.identity.user_id, key, digest.hexdigest())


# --- pages

PageCall = Call[object, PageQuery, object]


def page(call: PageCall, listed: Listed[dict[str, Any]]) -> Response:
    """Return one page of a list, with `X-Total-Count`, `Stream-Position` and `Link` (RFC 8288)."""
    return _page(call, listed, listed.rows, listed.rows[-1]["id"] if listed.rows else None)


def labels_page(call: PageCall, listed: Listed[tuple[int, str]]) -> Response:
    """Return one page of labels. Each row consists of an id and a label, but the client sees only the label."""
    return _page(call, listed, [label for _, label in listed.rows], listed.rows[-1][0] if listed.rows else None)


def _page(call: PageCall, listed: Listed[Any], items: Sequence[Any], last_id: Any) -> Response:
    headers = {"X-Total-Count": str(listed.total), "Cache-Control": "no-cache", **position(listed.head)}
    pages = _other_pages(call, listed, last_id)
    if len(call.query_string) > MAX_LINKED_QUERY_BYTES:
        pages = {rel: url for rel, url in pages.items() if rel == "next"}
    if pages:
        headers["Link"] = ", ".join(f'<{url}>; rel="{rel}"' for rel, url in pages.items())
    return JSONResponse(orjson.dumps(items), headers=headers)


def _other_pages(call: PageCall, listed: Listed[Any], last_id: Any) -> Mapping[str, str]:
    """Return the URLs of the `Link` header by link relation, such as "next"."""
    limit = call.query.limit
    if limit == 0:
        return {}
    offset, cursor = call.query.start, call.cursor
    after = getattr(call.query, "after", None)
    is_full = len(listed.rows) == limit
    if after is not None and not offset and not getattr(call.query, "sort", None):
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


def _url(call: AnyCall, **changes: int | str | None) -> str:
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


def client_prefers(headers: Headers, media_type: str) -> bool:
    """Return whether the `Accept` headers of a request, taken together, prefer the media type to JSON."""
    return prefers(",".join(headers.getlist("accept")), media_type)


def prefers(accept: str, media_type: str) -> bool:
    """Return whether `accept` names the media type and does not give JSON a higher weight."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights[media_range] = _weight(parameters)
    wanted = weights.get(media_type, 0.0)
    json = next((weights[name] for name in (JSON, "application/*", "*/*") if name in weights), 0.0)
    return wanted > 0 and wanted >= json


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
