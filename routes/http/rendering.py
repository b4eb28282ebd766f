"""From entities to responses: JSON, entity tags, preconditions and the headers of a page."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import orjson
from starlette.responses import Response

from core.errors import FieldProblem, InvalidInput
from repository.engine.events import Head
from repository.generic.idempotency import Claim, StoredResponse
from repository.generic.lists import Listed
from repository.generic.versions import IfMatch
from routes.http.operation import Call

_TAG = re.compile(r'^"([0-9]{1,10})-[0-9a-f]{16}"$')
_KEY = re.compile(r"^[\x21-\x7e]{1,255}$")


class JSONResponse(Response):
    """Encoded by orjson; bytes are taken as encoded already."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else orjson.dumps(content)


def answer(stored: StoredResponse) -> Response:
    headers = dict(stored.headers)
    return Response(stored.body, stored.status, headers, headers.get("content-type", "application/json"))


# --- entity tags (RFC 9110, section 8.8.3): `"<version>-<digest of the representation>"`


def tag(version: int, body: bytes) -> str:
    return f'"{version}-{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def entity(call: Call, version: int, body: bytes) -> Response:
    """The representation with its tag, or 304 when the client has it."""
    etag = tag(version, body)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    known = call.headers.get("if-none-match")
    if known is not None and _is_listed(etag, known):
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, "application/json")


def immutable(call: Call, content: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    """What never changes under its name, with its tag, or 304 when the client has it."""
    headers = {**headers, "ETag": tag(1, content)}
    known = call.headers.get("if-none-match")
    if known is not None and _is_listed(headers["ETag"], known):
        return Response(status_code=304, headers=headers)
    return Response(content, 200, headers, media_type)


def _is_listed(etag: str, header: str) -> bool:
    return header.strip() == "*" or etag in (part.strip().removeprefix("W/") for part in header.split(","))


def if_match(call: Call) -> IfMatch:
    """The versions that `If-Match` names; None without the header or with `*`. A tag not of ours matches nothing."""
    header = call.headers.get("if-match")
    if header is None or header.strip() == "*":
        return None
    matches = (_TAG.match(part.strip()) for part in header.split(","))
    return frozenset(int(match[1]) for match in matches if match is not None)


# --- idempotency


def claim(call: Call) -> Claim | None:
    """The caller's `Idempotency-Key` with a digest of the request. Raises InvalidInput for one that is no key."""
    key = call.headers.get("idempotency-key")
    if key is None or call.identity is None:
        return None
    if not _KEY.match(key):
        message = "Expected 1 to 255 visible ASCII characters"
        raise InvalidInput([FieldProblem(("header", "Idempotency-Key"), message, "invalid_idempotency_key")])
    digest = hashlib.blake2b(digest_size=32)
    for part in (call.method.encode(), call.url_path.encode(), call.query_string.encode("latin-1"), call.raw_body):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return Claim(call.identity.user_id, key, digest.hexdigest())


# --- pages


def page(
    call: Call, listed: Listed[Any], items: Sequence[Any] | None = None, *, last_id: int | None = None
) -> Response:
    """A list with `X-Total-Count`, `Stream-Position` and `Link` (RFC 8288). `items` stand for the rows when they are
    shown in another form; `last_id` is the page's last id when it walks by key.
    """
    items = listed.rows if items is None else items
    headers = {"X-Total-Count": str(listed.total), "Cache-Control": "no-cache", **position(listed.head)}
    links = _links(call, len(items), listed.total, last_id)
    if links:
        headers["Link"] = ", ".join(f'<{url}>; rel="{rel}"' for rel, url in links.items())
    return JSONResponse(orjson.dumps(items), headers=headers)


def _links(call: Call, count: int, total: int, last_id: int | None) -> Mapping[str, str]:
    limit = call.query.limit
    if limit == 0:
        return {}
    offset = call.query.start
    after = getattr(call.query, "after", None)
    if after is not None and not offset and not call.query.sort:
        return {"next": _url(call, after=last_id)} if count == limit and last_id is not None else {}
    links = {"first": _url(call, offset=0)}
    if offset > 0:
        links["prev"] = _url(call, offset=max(0, offset - limit))
    if count == limit if after is not None else offset + limit < total:
        links["next"] = _url(call, offset=offset + limit)
    if after is None:  # else `total` counts the rows before it, too
        links["last"] = _url(call, offset=max(0, (total - 1) // limit * limit))
    return links


def position(head: Head) -> dict[str, str]:
    """The header that says which number of the log the answer shows, so that watching can begin there."""
    return {"Stream-Position": f"{head.epoch}:{head.seq}"}


def link(call: Call, rel: str, **changes: int | str | None) -> str:
    """The value of `Link` that leads to the same path with another query."""
    return f'<{_url(call, **changes)}>; rel="{rel}"'


def _url(call: Call, **changes: int | str | None) -> str:
    kept = [
        (name, value)
        for name, value in parse_qsl(call.query_string, keep_blank_values=True)
        if name not in ("offset", "skip", *changes)
    ]
    # The path arrives decoded; user names in it may hold anything.
    return f"{call.prefix}{quote(call.url_path)}?{urlencode([*kept, *changes.items()], safe='[],:')}"
