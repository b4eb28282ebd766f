"""The parts of one process, from the database to the sockets. The application's lifespan starts and stops them.

Rules:
- `Parts(settings)` creates the parts and connects to nothing. `start` opens them, `stop` ends the background tasks,
  and `close` releases everything else. `running` does all of that in order.
- Parts receive one another through their constructors where the dependency points one way, and through listener lists
  (`on_events`, `on_reset`, `on_commit`, …) where it would be circular. All listeners are connected in `_connect`.
- All background tasks are in one group. When one of them fails, the process exits, because a process without its
  feed or bus would silently serve wrong data. A supervisor starts another process.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import structlog

from core import metrics
from core.errors import Unavailable
from core.logs import WarnOnce
from core.settings import Settings, signing_keys
from core.stopping import Stopping
from gateways.mail import gateway_for
from gateways.storage import open_storage
from jobs.cleanup import Cleanup, Retention
from jobs.mailer import Mailer
from jobs.orphans import Orphans
from jobs.runner import Runner
from realtime.fanout.hub import Hub
from realtime.fanout.job_progress import Progress
from realtime.fanout.snapshot import Snapshots
from realtime.feed.bus import Bus
from realtime.feed.feed import Feed
from realtime.presence.presence import Presence
from realtime.sockets.context import SocketContext
from realtime.sockets.places import Places
from realtime.sockets.registry import Registry
from realtime.sse.event_stream import MAX_STREAMS, EventStreams
from realtime.sse.replay import Replay
from repository.engine import event_log, failures, migrations
from repository.engine.database import Database
from repository.engine.engines import SQLITE_LOG_BYTES
from routes import table
from routes.http.operation import Services
from routes.http.proxies import TrustedNetworks
from server import open_files
from server.http_connections import HttpConnections
from services.authentication import identify, recheck
from services.bulk import BulkOperations
from services.first_admin import create_first_admin
from services.limits.limiter import Limits
from services.limits.lockout import Lockout
from services.limits.redis import SharedWindows
from services.passwords import Passwords, hasher_for
from services.pictures.pool import Pictures
from services.tokens import Tokens
from services.transfers.in_progress import Transfers

SWITCH_SECONDS = 0.0005
GAUGE_SECONDS = 0.5
# The time to finish the current chunks of jobs and the emails that are being sent.
HAND_OVER_SECONDS = 1.5
# When SQLite's write-ahead log exceeds this multiple of SQLITE_LOG_BYTES, writes wait until the log is emptied.
MAX_LOG_SIZES = 4
# Other writes wait during an attempt, and an export of another worker makes every attempt fail.
SHRINK_PAUSE_SECONDS = 5.0
# The readiness check reports a feed that is more than this many events behind the log.
MAX_LAG_EVENTS = 1_000

log = structlog.get_logger("parts")


class Parts:
    """All parts of one process."""

    limits: Limits  # Created by `start`, because the limiter's Redis keys contain the log's epoch.
    tasks: asyncio.Task[None]  # The task that runs all background tasks. Created by `start`.

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = Stopping()
        keys = signing_keys(settings)
        self._secret_key = keys[0]
        self.tokens = Tokens(
            keys,
            settings.algorithm,
            access_seconds=settings.access_token_expire_minutes * 60,
            refresh_seconds=settings.refresh_token_expire_days * 24 * 3600,
        )
        self.database = Database(
            settings.database_url, read_seconds=settings.read_timeout_seconds, has_pooler=settings.has_pooler
        )
        self.passwords = Passwords(hasher_for(settings), needs_mix=settings.needs_password_mix)
        self.storage = open_storage(settings)
        self.pictures = Pictures(limits_clients=settings.has_limits)
        self.bulk = BulkOperations(limits_clients=settings.has_limits)
        self.transfers = Transfers(limits_clients=settings.has_limits)
        # The parts that carry a committed event to the clients.
        self.bus = Bus(settings.broadcast_url, keys)
        self.feed = Feed(self.database, has_shared_bus=self.bus.is_shared, is_bus_deaf=self.bus.is_deaf)
        self.hub = Hub(self.feed)
        self.snapshots = Snapshots(self.database, self.feed)
        self.progress = Progress(self.database, self.hub)
        self.presence = Presence(self.database, self.bus.nudge)
        limits = open_files.fit(open_files.wanted(settings), open_files.limit())
        self.registry = Registry(partial(recheck, self.database))
        self.places = Places(
            max_connections=limits.sockets,
            max_per_address=limits.sockets_per_address if settings.has_limits else None,
        )
        self.http_connections = HttpConnections(
            max_connections=limits.http,
            max_per_address=limits.http_per_address if settings.has_limits else None,
            is_trusted=TrustedNetworks(settings.trusted_proxies).contain,
        )
        self.replay = Replay(self.database, self.feed)
        max_streams = min(MAX_STREAMS, limits.sockets, limits.http)
        self.event_streams = EventStreams(self.replay, self.registry, self.places, max_streams=max_streams)
        # Background work.
        self.runner = Runner(self.database)
        self.mailer = Mailer(
            self.database, gateway_for(settings), sender=settings.mail_from, base_url=settings.base_url
        )
        retention = Retention(
            settings.event_retention_hours,
            settings.event_retention_rows,
            settings.event_retention_bytes,
            settings.job_retention_hours,
        )
        self.cleanup = Cleanup(self.database, self.runner.owner, retention)
        self.orphans = Orphans(self.database, self.storage, self.runner.owner)
        self._connect()

    def _connect(self) -> None:
        self.database.on_commit += [self.bus.publish, self.runner.on_events]
        self.bus.on_events.append(self.feed.offer)
        self.bus.on_head.append(self.feed.offer_head)
        self.bus.on_reconnect.append(self.feed.poll_now)
        self.bus.on_nudge.append(self.presence.on_nudge)
        # The registry comes first, so that a connection that loses its rights receives no later events.
        self.feed.on_events += [self.registry.on_events, self.hub.publish, self.progress.on_events]
        self.feed.on_reset += [self.registry.on_reset, self.hub.on_reset]
        self.stopping.on_stop += [
            self.places.close,
            self.registry.close,
            self.event_streams.stop,
            self.runner.stop,
            self.mailer.stop,
        ]

    # --- lifecycle

    async def start(self) -> None:
        """Migrate the database, start the feed at the log's head and start the background tasks.

        Raises Unavailable, or SettingsError when the first admin cannot be created.
        """
        await migrations.migrate(self.database)
        await create_first_admin(self.database, self.settings)
        await self.feed.start()
        self.hub.start(self.feed.head.seq)
        self.limits = self._open_limits()
        self.tasks = asyncio.create_task(self._run_tasks(), name="background")
        self.tasks.add_done_callback(_exit_on_failure)
        _tune_interpreter()

    def _open_limits(self) -> Limits:
        settings = self.settings
        if not (settings.has_limits and settings.has_shared_bus):
            return Limits(is_on=settings.has_limits)
        # The epoch identifies the log, so workers share limits only with workers of the same installation.
        return Limits(shared=SharedWindows(settings.broadcast_url, f"marquee.limits.{self.feed.head.epoch}"))

    async def _run_tasks(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for task in (
                self.bus.run(lambda: self.feed.head),
                self.feed.run(),
                self.hub.run(),
                self.progress.run(),
                self.presence.run(),
                self.runner.run(),
                self.mailer.run(),
                self.cleanup.run(),
                self.orphans.run(),
                self.database.schema.run(),
                self._watch_gauges(),
            ):
                tasks.create_task(task)

    async def stop(self) -> None:
        """End the background tasks. Jobs and emails in progress get HAND_OVER_SECONDS."""
        self.stopping.begin()
        await asyncio.gather(self.runner.ended(HAND_OVER_SECONDS), self.mailer.ended(HAND_OVER_SECONDS))
        self.tasks.cancel()
        await asyncio.gather(self.tasks, return_exceptions=True)
        await self.limits.close()

    async def close(self) -> None:
        self.passwords.close()
        self.pictures.close()
        await self.database.close()

    # --- what the edges receive

    def state(self) -> Mapping[str, Any]:
        """Return the lifespan state of the application."""
        token = self.settings.metrics_token
        return {
            "services": self._services(),
            "realtime": self._socket_context(),
            "stopping": self.stopping,
            "http_connections": self.http_connections,
            "metrics_token": token.get_secret_value() if token is not None else None,
        }

    def _services(self) -> Services:
        return Services(
            database=self.database,
            tokens=self.tokens,
            passwords=self.passwords,
            outbox=self.mailer,
            activates_by_mail=self.settings.activates_by_mail,
            lockout=Lockout(self.database, self.limits, self._secret_key),
            readiness=self.readiness,
            openapi=partial(table.document, self.settings.root),
            storage=self.storage,
            pictures=self.pictures,
            bulk=self.bulk,
            transfers=self.transfers,
            event_pages=self.replay,
            event_streams=self.event_streams,
            limits=self.limits,
            limit_rules=table.limit_rules(self.settings),
            ratings_require_watched=self.settings.allows_only_watched,
            generated_rows_per_day=self.settings.generated_rows_per_day if self.settings.has_limits else None,
            users_per_address=self.settings.users_per_address,
        )

    def _socket_context(self) -> SocketContext:
        return SocketContext(
            feed=self.feed,
            live=self.hub,
            snapshots=self.snapshots,
            registry=self.registry,
            places=self.places,
            presence=self.presence,
            identify=partial(identify, self.database, self.tokens),
            explain=self.database.schema.explain,
            allowed_origins=self.settings.origins,
            warn_of_origin=WarnOnce(structlog.get_logger("http"), "origin rejected"),
            requires_auth=self.settings.websocket_auth == "required",
            limits_messages=self.settings.has_limits,
        )

    # --- health

    async def readiness(self) -> Mapping[str, str]:
        """Return the result of each check: `ok`, or a description of the problem."""
        checks = {"service": "ok", "database": "ok", "bus": "ok", "feed": "ok"}
        if self.stopping.is_draining or self.tasks.done():
            checks["service"] = "stopping"
        try:
            # The head is read last, because that read would wait for a lock that the other checks report.
            if (problem := await self._database_problem()) is not None:
                checks["database"] = problem
            elif (lag := (await event_log.head(self.database)).seq - self.feed.head.seq) > MAX_LAG_EVENTS:
                checks["feed"] = f"{lag} events behind the log"
        except Unavailable as error:
            has_cause = error.__cause__ is not None
            checks["database"] = failures.in_words(error.__cause__) if has_cause else str(error.detail)
        if self.bus.is_deaf():
            checks["bus"] = "silent: events are read from the log, up to a second late"
        return checks

    async def _database_problem(self) -> str | None:
        if (problem := await self.database.schema.problem() or self.database.file_problem()) is not None:
            return problem
        return await self.database.write_problem() or await self.database.read_problem()

    async def _watch_gauges(self) -> None:
        next_attempt = 0.0
        while True:
            metrics.FEED_SEQ.set(self.feed.head.seq)
            metrics.BUS_DEAF.set(self.bus.is_deaf())
            metrics.HTTP_UNSENT_BYTES.set(self.http_connections.unsent.total)
            metrics.WEBSOCKET_UNSENT_BYTES.set(self.places.unsent.total)
            metrics.SQLITE_LOG_BYTES.set(size := self.database.log_bytes())
            # An export keeps the log from being emptied, and writes would wait in vain.
            is_due = time.monotonic() >= next_attempt and not self.transfers.exports.total
            if size > MAX_LOG_SIZES * SQLITE_LOG_BYTES and is_due:
                next_attempt = time.monotonic() + SHRINK_PAUSE_SECONDS
                try:
                    await self.database.shrink_log()
                except Exception as error:
                    # An error here must not end the process, because the process still serves clients.
                    log.error("write-ahead log not emptied", exc_info=error)
            await asyncio.sleep(GAUGE_SECONDS)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Parts]:
    """Start the parts of this process and yield them. Stop and close them at the end of the block.

    Raises SettingsError, and what `Parts.start` raises.
    """
    parts = Parts(settings)
    try:
        await parts.start()
        try:
            yield parts
        finally:
            await parts.stop()
    finally:
        await parts.close()


def _exit_on_failure(tasks: asyncio.Task[None]) -> None:
    if not tasks.cancelled() and (error := tasks.exception()) is not None:
        log.critical("background task failed; exiting", exc_info=error)
        os._exit(1)


def _tune_interpreter() -> None:
    # While the event loop is busy, a thread that returns from the database waits for the interpreter, by default up to
    # 5 ms. With this shorter interval, bench.generate stored a quarter more rows per second, and its longest pause was
    # halved.
    sys.setswitchinterval(SWITCH_SECONDS)
    # Exclude existing objects from garbage collection, because examining them would block the event loop for 0.1 s.
    gc.collect()
    gc.freeze()
