"""Structured log lines on stderr, as console text or JSON, from our own loggers and those of libraries.

The log line of each request, with its fields, is written by `routes/http/middleware.py`.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import Processor

MAX_WARNED_VALUES = 100  # the limit for each event, because a client that invents values must not fill the log


def configure(log_format: str, log_level: str) -> None:
    """Set up logging for the process. `log_format` and `log_level` are the settings LOG_FORMAT and LOG_LEVEL."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor]
    if log_format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Use plain tracebacks, because rich ones print local variables, including passwords and tokens.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last], foreign_pre_chain=shared
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(log_level.upper())
    for noisy in ("uvicorn", "uvicorn.error", "uvicorn.access", "faker", "asyncio", "alembic", "aiosqlite"):
        logger = logging.getLogger(noisy)
        logger.handlers = []
        logger.propagate = True
        # At level info, these loggers repeat our own lines, and uvicorn logs the query strings of websocket URLs.
        logger.setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


class WarnOnce:
    """A callable that logs the warning `event` once for each value, for at most MAX_WARNED_VALUES values."""

    def __init__(self, log: Any, event: str) -> None:
        self._log = log
        self._event = event
        self._seen: set[str] = set()

    def __call__(self, value: str, **fields: Any) -> None:
        key = value[:255]
        if key not in self._seen and len(self._seen) < MAX_WARNED_VALUES:
            self._seen.add(key)
            self._log.warning(self._event, **fields)
