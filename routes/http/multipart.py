"""Parse a complete multipart/form-data body (RFC 7578) by a fast search for its boundary. Pure: no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

MAX_PARTS = 20
MAX_BOUNDARY_LENGTH = 70  # RFC 2046, section 5.1.1
MAX_PART_HEADER_BYTES = 4 * 1024
LINE = b"\r\n"


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    content: bytes
    is_chosen: bool  # whether the part has a file name


def parts(body: bytes, content_type: str) -> list[Part]:
    """Return the parts in order, without their media types. Raises a ValueError that says what was expected."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= MAX_BOUNDARY_LENGTH:
        raise ValueError(f"expected a boundary of 1 to {MAX_BOUNDARY_LENGTH} characters in Content-Type")
    # The first delimiter may be at the very beginning, without a line break before it.
    _, *pieces = (LINE + body).split(LINE + b"--" + boundary, MAX_PARTS + 2)
    if not pieces or len(pieces) > MAX_PARTS + 1 or not pieces[-1].startswith(b"--"):
        raise ValueError(
            f"expected at most {MAX_PARTS} parts between boundaries, and two dashes after the last boundary"
        )
    return [_part(piece) for piece in pieces[:-1]]


def _part(piece: bytes) -> Part:
    header, divider, content = piece.partition(LINE * 2)
    if not divider or len(header) > MAX_PART_HEADER_BYTES:
        raise ValueError(f"expected a part to have at most {MAX_PART_HEADER_BYTES} bytes of headers and an empty line")
    for line in header.split(LINE):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            kind, options = parse_options_header(value.decode("latin-1").strip())
            if kind == b"form-data" and b"name" in options:
                is_chosen = bool(options.get(b"filename"))
                return Part(options[b"name"].decode("utf-8", errors="replace"), content, is_chosen)
    raise ValueError("expected each part to have the header Content-Disposition: form-data; name=…")
