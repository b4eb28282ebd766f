"""Bodies that carry a picture: a form with the file in it, or the file alone.

The file's name and declared media type are ignored.
"""

from __future__ import annotations

from typing import Any

from core.errors import ContentTooLarge, FieldProblem
from routes.http import multipart

FILE_FIELD = "avatar"
MULTIPART_MEDIA_TYPE = "multipart/form-data"
FILE_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")
MEDIA_TYPES = (MULTIPART_MEDIA_TYPE, *FILE_MEDIA_TYPES)
MAX_AVATAR_BYTES = 5 * 1024 * 1024
MAX_UPLOAD_BODY_BYTES = MAX_AVATAR_BYTES + 64 * 1024  # the rest of the form


def values(raw: bytes, media_type: str, content_type: str, problems: list[FieldProblem]) -> dict[str, Any] | None:
    """Return the form's strings and the bytes of its file, or None when the form is malformed. Raises ContentTooLarge.

    Forms have no null: an empty string stands for it.
    """
    if media_type in FILE_MEDIA_TYPES:
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
            if content:  # browsers send an empty file when none was chosen
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
