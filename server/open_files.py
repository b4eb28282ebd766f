"""The limit on open files: raised as far as the system allows, and compared with the number that the settings need."""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import dataclass

import structlog

from core.settings import Settings

RESERVED_FILES = 96  # reserved for everything except client connections: databases, Redis, storage, logs, libraries

log = structlog.get_logger("open_files")


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The maximum numbers of connections that a process accepts."""

    sockets: int  # the limit for websockets and event streams together
    sockets_per_address: int
    http: int
    http_per_address: int


def wanted(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        settings.max_connections,
        settings.max_connections_per_address,
        settings.max_http_connections,
        settings.max_http_connections_per_address,
    )


def limit() -> int:
    """Return how many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit(settings: Settings) -> None:
    """Raise the limit on open files to the hard limit, for this process and for the workers that it starts.

    Log a warning if the hard limit is too low for the connections that the settings allow.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS rejects an infinite limit.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    number = limit()
    needed = settings.max_connections + settings.max_http_connections + RESERVED_FILES
    if is_limited(number) and number < needed:
        fitted = fit(wanted(settings), number)
        log.warning(
            "open files limit too low",
            limit=number,
            needed=needed,
            websockets=fitted.sockets,
            http_connections=fitted.http,
            hint="raise the limit (ulimit -n, LimitNOFILE=, docker run --ulimit nofile=), "
            "or lower MAX_CONNECTIONS and MAX_HTTP_CONNECTIONS",
        )


def is_limited(number: int) -> bool:
    return number not in (resource.RLIM_INFINITY, -1)


def fit(limits: ConnectionLimits, number: int) -> ConnectionLimits:
    """Return the limits, lowered if needed so that RESERVED_FILES of `number` open files remain for other uses.

    If the limits are lowered, each address may have at most a quarter of the connections.
    """
    total = limits.sockets + limits.http
    room = max(2, number - RESERVED_FILES)
    if not is_limited(number) or total <= room:
        return limits
    http = max(1, room * limits.http // total)
    sockets = max(1, room - http)
    return ConnectionLimits(
        sockets,
        min(limits.sockets_per_address, max(1, sockets // 4)),
        http,
        min(limits.http_per_address, max(1, http // 4)),
    )
