"""The bodies of error responses: `{"detail": …}`, or RFC 9457 problem details for a client that prefers them.

This module does no I/O. It also compares what `Accept` and `Accept-Encoding` list (RFC 9110, section 12.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
# The body depends on this request header, so every error response names it in `Vary`.
VARY = "Accept"
# The headers of browsers have at most a few hundred characters. Parsing 64 KiB of commas takes 30 ms.
MAX_ACCEPT_LENGTH = 2_000


def encoded(status: int, detail: str | Sequence[Mapping[str, Any]], accept: str, **more: Any) -> tuple[bytes, str]:
    """Return the body of an error and its media type. `more` holds further members of problem details."""
    if PROBLEM_JSON not in accept.lower() or not prefers(accept, PROBLEM_JSON):  # the first test is the cheaper one
        return orjson.dumps({"detail": detail}), JSON
    errors = {} if isinstance(detail, str) else {"errors": detail}
    about = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    return orjson.dumps({**about, "detail": _in_words(detail), **errors, **more}), PROBLEM_JSON


def _in_words(detail: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the detail as a sentence: of several problems, the first one and the number of the others."""
    if isinstance(detail, str):
        return detail
    first = f"{'.'.join(map(str, detail[0]['loc']))}: {detail[0]['msg']}"
    return first if len(detail) == 1 else f"{first} ({len(detail) - 1} more in `errors`)"


def prefers(accept: str, media_type: str) -> bool:
    """Return whether `accept` names the media type and does not give JSON a higher weight."""
    weights = weights_of(accept)
    wanted = weights.get(media_type, 0.0)
    json = next((weights[name] for name in (JSON, "application/*", "*/*") if name in weights), 0.0)
    return wanted > 0 and wanted >= json


def weights_of(accepted: str) -> dict[str, float]:
    """Return the weight of each media range or coding that an `Accept` or `Accept-Encoding` header lists.

    Of a header with more than MAX_ACCEPT_LENGTH characters, only the items that end before this length count.
    """
    if len(accepted) > MAX_ACCEPT_LENGTH:
        accepted = accepted[:MAX_ACCEPT_LENGTH].rpartition(",")[0]
    weights: dict[str, float] = {}
    for part in accepted.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights[name] = _weight(parameters)
    return weights


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
