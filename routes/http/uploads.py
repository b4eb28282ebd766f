"""Reading request bodies, and those with a picture: a form that contains the file, or the file alone.

The file's name and declared media type are ignored.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from core.errors import ContentTooLarge, FieldProblem, RequestTimeout, Unavailable, UnsupportedMediaType
from core.stopping import Stopping
from routes.http import multipart
from schemas import MAX_BODY_BYTES

BODY_SECONDS = 60.0  # enough for a bulk body over a slow line; a longer limit would only keep connections busy

FILE_SECONDS = 600.0  # enough for 100 MB at 170 kB/s

FILE_FIELD = "avatar"
MULTIPART_MEDIA_TYPE = "multipart/form-data"
FILE_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")
EMPTY_FILE = FieldProblem(("body", FILE_FIELD), "Expected a picture, got an empty file", "empty_file")
MAX_AVATAR_BYTES = 5 * 1024 * 1024
MAX_UPLOAD_BODY_BYTES = MAX_AVATAR_BYTES + 64 * 1024  # the rest of the form needs some room, too


async def read_body(request: Request, limit: int, on_large: Callable[[], None] | None = None) -> bytes:
    """Return the body. Raises ContentTooLarge (as early as possible), RequestTimeout, and Unavailable on shutdown.

    `on_large` is called once, before more than MAX_BODY_BYTES are read, if the body is larger. What it raises is raised
    before the rest of the body is read.
    """
    stopping: Stopping = request.state.stopping
    too_large = ContentTooLarge(f"Expected a body of at most {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    if on_large is not None and declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        on_large()
        on_large = None
    chunks, size = [], 0
    try:
        async with stopping.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large
                if on_large is not None and size > MAX_BODY_BYTES:  # a body in chunks does not declare its size
                    on_large()
                    on_large = None
                chunks.append(chunk)
    except TimeoutError:
        if stopping.is_stopping:
            raise Unavailable("The service is stopping and has done nothing; send the request again") from None
        raise RequestTimeout(f"Expected the whole body within {BODY_SECONDS:g} seconds") from None
    return b"".join(chunks)


def require_media_type(request: Request, expected: Sequence[str], limit: int) -> None:
    """Raise UnsupportedMediaType or ContentTooLarge for a body that is not accepted, before it is read."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in expected:
        raise UnsupportedMediaType(f"Content-Type: expected {' or '.join(expected)}")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise ContentTooLarge(f"Expected a body of at most {limit} bytes")


async def stream(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body in parts. Raises ContentTooLarge, RequestTimeout, and Unavailable on shutdown.

    The time limit includes the time that the caller takes for each part, but only waiting for a part is interrupted.
    """
    stopping: Stopping = request.state.stopping
    loop = asyncio.get_running_loop()
    due = loop.time() + FILE_SECONDS
    parts = request.stream()
    size = 0
    while True:
        if stopping.is_stopping:
            due = min(due, stopping.due)
        try:
            async with stopping.timeout(due - loop.time()):
                part = await anext(parts, None)
            if part is not None and loop.time() > due:  # a part that has arrived already is received without waiting
                raise TimeoutError
        except TimeoutError:
            if stopping.is_stopping:
                raise Unavailable("The service is stopping and has done nothing; send the request again") from None
            raise RequestTimeout(f"Expected the whole file within {FILE_SECONDS:g} seconds") from None
        if part is None:
            return
        size += len(part)
        if size > limit:
            raise ContentTooLarge(f"Expected a body of at most {limit} bytes")
        yield part


def media_types(form: type[BaseModel]) -> tuple[str, ...]:
    """Return the media types of a body: a form and, if the form requires the file, also the file alone.

    In a profile, the file is optional, and a file alone would empty all other fields.
    """
    is_needed = form.model_fields[FILE_FIELD].is_required()
    return (MULTIPART_MEDIA_TYPE, *FILE_MEDIA_TYPES) if is_needed else (MULTIPART_MEDIA_TYPE,)


def values(raw: bytes, media_type: str, content_type: str, problems: list[FieldProblem]) -> dict[str, Any] | None:
    """Return the form's strings and the bytes of its file, or None if the form is malformed. Raises ContentTooLarge.

    Forms have no null, so an empty string stands for null.
    """
    if media_type in FILE_MEDIA_TYPES:
        if not raw:
            problems.append(EMPTY_FILE)
        return {FILE_FIELD: _bounded(raw)}
    try:
        parts = multipart.parts(raw, content_type)
    except ValueError as error:
        message = str(error)
        problems.append(FieldProblem(("body",), message[:1].upper() + message[1:], "invalid_multipart"))
        return None
    found: dict[str, Any] = {}
    for part in parts:
        name, content = part.name, part.content
        if name in found:
            problems.append(FieldProblem(("body", name), "Expected at most once", "repeated"))
        elif name == FILE_FIELD:
            if not content and part.is_chosen:
                problems.append(EMPTY_FILE)
            if content or part.is_chosen:  # browsers send an empty, nameless file if the user chose none
                found[name] = _bounded(content)
        else:
            try:
                found[name] = content.decode() or None
            except UnicodeDecodeError:
                found[name] = ""
                problems.append(FieldProblem(("body", name), "Expected UTF-8 text", "invalid_utf8"))
    return found


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_AVATAR_BYTES:
        raise ContentTooLarge(f"Expected a picture of at most {MAX_AVATAR_BYTES} bytes")
    return content
