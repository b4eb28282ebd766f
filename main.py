"""The composition root: `build_app(settings)` puts the service together; `python main.py` serves it.

`uvicorn main:app` works, too; only here, sockets get the fast path of `server.websocket_protocol`, and the stop its
deadline.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from core import logs, metrics
from core.errors import Problem, SettingsError, Unavailable
from core.settings import Settings, load_settings, secret_key, signing_keys
from core.stopping import Stopping
from dashboard.routes import ROUTES as DASHBOARD_ROUTES
from gateways.mail import gateway_for
from gateways.storage import check as check_storage
from gateways.storage import open_storage
from jobs.cleanup import Cleanup
from jobs.mailer import Mailer
from jobs.orphans import Orphans
from jobs.runner import Runner
from realtime.asyncapi.document import ROUTES as ASYNCAPI_ROUTES
from realtime.fanout.hub import Hub
from realtime.fanout.progress import Progress
from realtime.fanout.snapshot import Snapshots
from realtime.fanout.subscription import Sources
from realtime.feed.bus import Bus
from realtime.feed.feed import Feed
from realtime.presence.presence import Presence
from realtime.sockets.context import Surroundings
from realtime.sockets.endpoint import ROUTES as REALTIME_ROUTES
from realtime.sockets.endpoint import Realtime
from realtime.sockets.registry import Registry
from realtime.sse.event_stream import EventStreams
from realtime.sse.replay import Replay
from repository.engine import event_log, failures, migrations
from repository.engine.database import Database
from routes import table
from routes.http import middleware
from routes.http.operation import Services
from routes.http.proxies import TrustedProxies
from server import serving, supervisor
from services.authentication import identify, recheck
from services.first_admin import create_first_admin
from services.limits.limiter import Limits
from services.limits.lockout import Lockout
from services.limits.redis import SharedWindows
from services.passwords import Passwords, hasher_for
from services.pictures.pool import MAX_UPLOADS_PER_USER, Pictures
from services.tokens import Tokens

SWITCH_SECONDS = 0.0005
GAUGE_SECONDS = 0.5
HAND_OVER_SECONDS = 1.5  # for chunks of jobs and for mails that are on their way

log = structlog.get_logger("main")


def build_app(settings: Settings, *, hears_signals: bool = False) -> Starlette:
    """The whole service as an ASGI application. Nothing is opened before its lifespan starts.

    `hears_signals`: for servers that do not say when they begin to stop.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with serve_in_background(settings) as state:
            with state["stopping"].begin_on_signals() if hears_signals else nullcontext():
                yield state

    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.allowed_origins),
        allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=[
            "Authorization",
            "Content-Type",
            "Idempotency-Key",
            "If-Match",
            "If-None-Match",
            "Last-Event-ID",
            "X-Request-ID",
        ],
        expose_headers=[
            "ETag",
            "Link",
            "Location",
            "RateLimit-Limit",
            "RateLimit-Remaining",
            "RateLimit-Reset",
            "Retry-After",
            "Stream-Position",
            "X-Request-ID",
            "X-Total-Count",
        ],
    )
    proxies = Middleware(TrustedProxies, networks=settings.trusted_proxies)
    app = Starlette(
        routes=[*table.routes(), *REALTIME_ROUTES, *ASYNCAPI_ROUTES, *DASHBOARD_ROUTES],
        middleware=[
            *([proxies] if settings.trusted_proxies else []),
            Middleware(middleware.OnePath),
            Middleware(middleware.RequestLog),
            *([cors] if settings.allowed_origins else []),
            Middleware(middleware.NoNewSockets),
            Middleware(middleware.Unexpected),
        ],
        exception_handlers={Problem: middleware.on_problem, HTTPException: middleware.on_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.router.default = middleware.not_found
    return app


@asynccontextmanager
async def serve_in_background(settings: Settings) -> AsyncIterator[Mapping[str, Any]]:
    """Everything that lives as long as the process: the database, the event's way to the sockets, the jobs."""
    tokens = Tokens(
        signing_keys(settings),
        settings.algorithm,
        access_seconds=settings.access_token_expire_minutes * 60,
        refresh_seconds=settings.refresh_token_expire_days * 24 * 3600,
    )
    database = Database(settings.database_url)
    passwords = Passwords(hasher_for(settings), needs_mix=settings.needs_password_mix)
    storage = open_storage(settings)
    pictures = Pictures(max_uploads_per_user=MAX_UPLOADS_PER_USER if settings.has_limits else None)
    stopping = Stopping()
    metrics_token = settings.metrics_token.get_secret_value() if settings.metrics_token is not None else None
    try:
        await migrations.migrate(database)
        await create_first_admin(database, settings)
        hub = Hub(lambda seq: feed.newest_after(seq))
        registry = Registry(
            partial(recheck, database),
            max_connections=settings.max_connections,
            max_per_address=settings.max_connections_per_address if settings.has_limits else None,
        )
        bus = Bus(
            settings.broadcast_url,
            on_events=lambda events: feed.offer(events),
            on_head=lambda head: feed.hear_head(head),
            on_reconnect=lambda: feed.look(),
            on_nudge=lambda _: presence.hear(),
        )
        feed = Feed(database, has_shared_bus=bus.is_shared, is_bus_deaf=lambda: bus.is_deaf)
        progress = Progress(database, hub)
        replay = Replay(database, feed)
        event_streams = EventStreams(replay, registry)
        runner = Runner(database)
        mailer = Mailer(database, gateway_for(settings), sender=settings.mail_from, base_url=settings.base_url)
        cleanup = Cleanup(database, runner.owner, settings.event_retention_hours, settings.event_retention_rows)
        presence = Presence(database, lambda topic: bus.nudge(topic))
        around = Surroundings(
            Sources(feed, hub, Snapshots(database, feed)),
            registry,
            presence,
            partial(identify, database, tokens),
            has_limits=settings.has_limits,
        )
        stopping.on_stop += [registry.close, event_streams.stop, runner.stop, mailer.stop]
        await feed.start()
        # The epoch names the log, and so all workers of one installation, whatever else uses the same Redis.
        is_shared = settings.has_limits and settings.has_shared_bus
        shared = SharedWindows(settings.broadcast_url, f"marquee.limits.{feed.head.epoch}") if is_shared else None
        limits = Limits(is_on=settings.has_limits, shared=shared)
        hub.start(feed.head.seq)
        # Whoever may see no more is told before what comes next goes out.
        feed.on_events += [registry.see, hub.publish, progress.see]
        feed.on_reset += [registry.see_reset, lambda reason: hub.reset(reason, feed.head.seq)]
        database.on_commit += [bus.publish, runner.on_events]
        life = asyncio.create_task(
            _live_together(
                bus.run(lambda: feed.head),
                feed.run(),
                progress.run(),
                presence.run(),
                runner.run(),
                mailer.run(),
                cleanup.run(),
                Orphans(database, storage, runner.owner).run(),
                watch_gauges(feed, bus),
            ),
            name="background",
        )
        life.add_done_callback(_die_with)
        # A thread that comes back from the database asks for the interpreter; by default a busy loop lets it wait for
        # 5 ms each time. Measured with bench.generate: a quarter more rows per second, half the longest pause.
        sys.setswitchinterval(SWITCH_SECONDS)
        # What is loaded now stays: looking through it again at each full collection stops the loop for a tenth of a
        # second at a time.
        gc.collect()
        gc.freeze()

        async def readiness() -> Mapping[str, str]:
            return await check_readiness(database, feed, bus, life, stopping)

        try:
            yield {
                "services": Services(
                    database=database,
                    tokens=tokens,
                    passwords=passwords,
                    outbox=mailer,
                    activates_by_mail=settings.activates_by_mail,
                    lockout=Lockout(database, limits),
                    readiness=readiness,
                    openapi=table.document,
                    storage=storage,
                    pictures=pictures,
                    event_pages=replay,
                    event_streams=event_streams,
                    limits=limits,
                    limit_rules=table.limit_rules(settings),
                ),
                "realtime": Realtime(around, settings.allowed_origins, settings.websocket_auth == "required"),
                "stopping": stopping,
                "metrics_token": metrics_token,
            }
        finally:
            stopping.begin()
            await asyncio.gather(runner.ended(HAND_OVER_SECONDS), mailer.ended(HAND_OVER_SECONDS))
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            await limits.close()
    finally:
        passwords.close()
        pictures.close()
        await database.close()


async def _live_together(*lives: Any) -> None:
    async with asyncio.TaskGroup() as tasks:
        for life in lives:
            tasks.create_task(life)


def _die_with(life: asyncio.Task[None]) -> None:
    """A process whose feed or bus has died would be silently wrong: it ends instead, and is started again."""
    if not life.cancelled() and (error := life.exception()) is not None:
        log.critical("a background task died; the process ends", exc_info=error)
        os._exit(1)


async def prepare(settings: Settings) -> None:
    """Migrate and create the first admin, so that what is wrong with the database or the account is said at once.

    Raises SettingsError.
    """
    try:
        database = Database(settings.database_url)
    except OSError as error:
        raise SettingsError(f"DATABASE_URL: the database's folder cannot be made: {error.strerror}.") from error
    try:
        await migrations.migrate(database)
        await create_first_admin(database, settings)
        await check_storage(open_storage(settings))
    except failures.DATABASE_ERRORS as error:
        reason = failures.first_line(error)
        raise SettingsError(f"DATABASE_URL: the database cannot be used: {reason}.") from error
    except Unavailable as error:
        reason = failures.first_line(error.__cause__ or error)
        raise SettingsError(f"DATABASE_URL: the database cannot be used: {reason}.") from error
    finally:
        await database.close()


async def watch_gauges(feed: Feed, bus: Bus) -> None:
    """What is a state and not an occasion to count is looked at now and then."""
    while True:
        metrics.FEED_SEQ.set(feed.head.seq)
        metrics.BUS_DEAF.set(bus.is_deaf)
        await asyncio.sleep(GAUGE_SECONDS)


async def check_readiness(
    database: Database, feed: Feed, bus: Bus, life: asyncio.Task[None], stopping: Stopping
) -> Mapping[str, str]:
    """One sentence a check, `ok` when all is well."""
    checks = {"service": "ok", "database": "ok", "bus": "ok", "feed": "ok"}
    if stopping.is_draining or life.done():
        checks["service"] = "stopping"
    try:
        head = await event_log.head(database)
        if head.seq - feed.head.seq > 1_000:
            checks["feed"] = f"{head.seq - feed.head.seq} events behind the log"
    except Unavailable:
        checks["database"] = "not reachable"
    if bus.is_deaf:
        checks["bus"] = "silent: events are read from the log, up to a second late"
    return checks


def run(arguments: Sequence[str] = ()) -> int:
    """`python main.py`. Answers the exit status."""
    try:
        settings = load_settings()
        logs.configure(settings.log_format, settings.log_level)
        secret_key(settings)  # once, before there are workers to race for it
        table.limit_rules(settings)  # what it says of routes, before anything is opened
        asyncio.run(prepare(settings))
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
    """`main:app`, and `main:worker` for our own server: built when asked for, so that importing this module opens and
    reads nothing.
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
