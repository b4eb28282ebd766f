"""What media type a client would rather have. Pure."""

from __future__ import annotations

from starlette.datastructures import Headers

JSON = "application/json"


def client_prefers(headers: Headers, media_type: str) -> bool:
    """`prefers`, of all the `Accept` headers of a request together."""
    return prefers(",".join(headers.getlist("accept")), media_type)


def prefers(accept: str, media_type: str) -> bool:
    """Whether `Accept` (RFC 9110, section 12.5.1) names the media type, and does not like JSON better."""
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
