"""The composition root: `build_app(settings)` builds the application; `python main.py` serves it.

`uvicorn main:app` also works, but without the fast path of `server.websocket_protocol` and without a shutdown
deadline.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from core import logs
from core.errors import Problem, SettingsError, Unavailable
from core.settings import Settings, load_settings, secret_key, warn_of_misspelt_settings
from dashboard.routes import ROUTES as DASHBOARD_ROUTES
from gateways.storage import check as check_storage
from gateways.storage import open_storage
from realtime.asyncapi.document import ROUTES as ASYNCAPI_ROUTES
from realtime.sockets.endpoint import ROUTES as REALTIME_ROUTES
from repository.engine import failures, migrations
from repository.engine.database import Database
from repository.engine.engines import SAFE_SQLITE, sqlite_is_safe
from routes import table
from routes.compression import Compression
from routes.http import middleware
from routes.http.hosts import Cors, HostCheck
from routes.http.proxies import TrustedProxies
from server import open_files, parts, serving, supervisor
from services.first_admin import create_first_admin

CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
CORS_REQUEST_HEADERS = (
    "Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "Last-Event-ID", "X-Request-ID",
)  # fmt: skip
CORS_RESPONSE_HEADERS = (
    "Content-Disposition", "ETag", "Idempotency-Replayed", "Link", "Location", "RateLimit", "RateLimit-Limit",
    "RateLimit-Policy", "RateLimit-Remaining", "RateLimit-Reset", "Retry-After", "Stream-Position", "X-Request-ID",
    "X-Total-Count",
)  # fmt: skip


def _routes(settings: Settings) -> list[BaseRoute]:
    """Return all routes. Raises SettingsError when the root path conflicts with a route."""
    routes = [*table.routes(), *REALTIME_ROUTES, *ASYNCAPI_ROUTES, *DASHBOARD_ROUTES]
    table.check_root(settings.root, routes)
    return routes


def build_app(settings: Settings, *, hears_signals: bool = False) -> Starlette:
    """Return the service as an ASGI application. The application opens nothing before its lifespan starts.

    With `hears_signals`, SIGTERM and SIGINT begin the shutdown, for servers that do not tell the application when they
    begin to stop.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with AsyncExitStack() as stack:
            with usable_database():
                found = await stack.enter_async_context(parts.running(settings))
            with found.stopping.begin_on_signals() if hears_signals else nullcontext():
                yield found.state()

    cors = Middleware(
        Cors,
        allow_origins=settings.allowed_origins,
        allow_methods=CORS_METHODS,
        allow_headers=CORS_REQUEST_HEADERS,
        expose_headers=CORS_RESPONSE_HEADERS,
    )
    proxies = Middleware(TrustedProxies, networks=settings.trusted_proxies)
    app = Starlette(
        routes=_routes(settings),
        middleware=[
            *([proxies] if settings.trusted_proxies else []),
            Middleware(middleware.OnePath, root=settings.root),
            *([Middleware(middleware.ClientShare)] if settings.has_limits else []),
            Middleware(middleware.RequestLog),
            *([Middleware(Compression)] if settings.compresses else []),
            Middleware(HostCheck, allowed=settings.hosts),
            cors,
            Middleware(middleware.NoNewSockets),
            Middleware(middleware.Unexpected),
        ],
        exception_handlers={Problem: middleware.on_problem, HTTPException: middleware.on_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.router.default = middleware.not_found
    app.router.lifespan = partial(_lifespan, app.router.lifespan)  # type: ignore[method-assign]
    return app


async def _lifespan(
    lifespan: Callable[[Scope, Receive, Send], Awaitable[None]], scope: Scope, receive: Receive, send: Send
) -> None:
    """Run Starlette's lifespan, but if the start fails because of a setting, report this instead of a traceback."""

    async def send_sentence(message: Message) -> None:
        error = sys.exc_info()[1]  # Starlette sends the message while it handles the error
        if message["type"] == "lifespan.startup.failed" and isinstance(error, SettingsError):
            message = {**message, "message": f"Marquee cannot start. {error}"}
        await send(message)

    await lifespan(scope, receive, send_sentence)


@contextmanager
def usable_database() -> Iterator[None]:
    """Raise SettingsError, with the reason, if the database cannot be used in this context."""
    try:
        yield
    except failures.DATABASE_ERRORS as error:
        reason = failures.first_line(error)
        raise SettingsError(f"DATABASE_URL: the database cannot be used: {reason}.") from error
    except Unavailable as error:
        reason = failures.first_line(error.__cause__ or error)
        raise SettingsError(f"DATABASE_URL: the database cannot be used: {reason}.") from error


async def prepare(settings: Settings) -> None:
    """Migrate the database, create the first admin and check the file storage, before anything is served.

    Raises SettingsError for a setting that does not work.
    """
    try:
        database = Database(settings.database_url, has_pooler=settings.has_pooler)
    except OSError as error:
        raise SettingsError(f"DATABASE_URL: the database's folder cannot be created: {error.strerror}.") from error
    try:
        with usable_database():
            await migrations.migrate(database)
            if (problem := await database.schema.problem()) is not None:
                raise SettingsError(f"DATABASE_URL: the database cannot be used: {problem}.")
            await create_first_admin(database, settings)
            await check_storage(open_storage(settings))
    finally:
        await database.close()


def warn_of_old_sqlite(settings: Settings) -> None:
    """Log a warning when several workers will share a SQLite file and this version of SQLite may damage it."""
    if settings.workers > 1 and settings.database_url.startswith("sqlite") and not sqlite_is_safe():
        structlog.get_logger("main").warning(
            "sqlite too old for several workers",
            version=sqlite3.sqlite_version,
            expected=".".join(map(str, SAFE_SQLITE)),
            risk="two workers can damage the database file",
            hint="set WORKERS=1, use PostgreSQL, or run a Python with a newer SQLite",
        )


def run() -> int:
    """Start and serve the application, as `python main.py` does, and return the exit status."""
    try:
        settings = load_settings()
        logs.configure(settings.log_format, settings.log_level)
        warn_of_misspelt_settings()
        # Create the secret key before several workers try to, and validate RATE_LIMITS and ROOT_PATH before anything
        # is opened.
        secret_key(settings)
        table.limit_rules(settings)
        _routes(settings)
        asyncio.run(prepare(settings))
        open_files.raise_limit(settings)
        warn_of_old_sqlite(settings)
        listener = serving.listen(settings)
        banner = serving.banner(settings, listener.getsockname()[1])
        announce = partial(print, banner, flush=True)
        if settings.workers > 1:
            return supervisor.Supervisor(settings, "main:worker", listener).run(announce)
        serving.serve(settings, build_app(settings), listener, announce)
        return 0
    except SettingsError as error:
        print(f"Marquee cannot start. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def __getattr__(name: str) -> Any:
    """Build `main:app`, or `main:worker` for our own server, only on access, so that importing this module neither
    opens nor reads anything.
    """
    if name not in ("app", "worker"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        settings = load_settings()
        logs.configure(settings.log_format, settings.log_level)
        return build_app(settings, hears_signals=name == "app")
    except SettingsError as error:
        sys.exit(f"Marquee cannot start. {error}")


if __name__ == "__main__":
    sys.exit(run())
