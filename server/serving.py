"""Listening and serving with uvicorn, and the orderly shutdown of a process."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import structlog
import uvicorn

from core.errors import SettingsError
from core.network.hosts import UNSPECIFIED
from core.settings import Settings
from core.stopping import Stopping
from realtime.fanout.subscription import SLOW_CLIENT_SECONDS
from realtime.sockets.endpoint import HEARTBEAT_SECONDS
from schemas import MAX_BODY_BYTES
from server.http_protocol import MarqueeHTTPProtocol
from server.websocket_protocol import MarqueeWebSocketProtocol

# The maximum size of a client's message.
MAX_FRAME_BYTES = MAX_BODY_BYTES
# Longer than SLOW_CLIENT_SECONDS, so that a slow reader is closed with the code TOO_SLOW before its ping times out.
PING_TIMEOUT_SECONDS = SLOW_CLIENT_SECONDS + 15
STOP_SECONDS = 10.0
# The time for open requests to finish, out of STOP_SECONDS.
REQUEST_SECONDS = 7.0
# At least this many websockets are closed at a time.
BATCH_SOCKETS = 100
BATCH_SECONDS = 0.05
# All websockets are closed within this time, in larger batches if there are many.
SPREAD_SECONDS = 2.5
TICK_SECONDS = 0.1
# A peer that has vanished is noticed within two minutes: at most 15 s until an event stream's next heartbeat, and then
# VANISHED_SECONDS. VANISHED_SECONDS is longer than the deadlines for slow readers, because the system could otherwise
# take a slow reader for a vanished peer.
VANISHED_SECONDS = 90
PROBE_AFTER_SECONDS = 30
PROBE_INTERVAL_SECONDS = 15
# Enough for a line of 100 Mbit/s to be busy for the 10 ms until the next write.
UNSENT_BYTES = 128 * 1024

log = structlog.get_logger("serving")


def banner(settings: Settings, port: int) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    shown = "127.0.0.1" if settings.host in UNSPECIFIED else host
    address = f"{shown}:{port}{settings.root}"
    base = f"http://{address}"
    kind = "SQLite" if settings.sqlite_path else "PostgreSQL"
    bus = "Redis" if settings.has_shared_bus else "in-memory bus"
    others = ""
    if settings.hosts.allows_addresses and not settings.hosts.allows_all:
        named = f", or at {', '.join(settings.allowed_hosts)}" if settings.allowed_hosts else ""
        others = f"""
  Other machines can reach Marquee at the IP address of this machine{named}.
  To use other names (of a machine, a container or a proxy), list them in ALLOWED_HOSTS.
"""
    json = "-H 'Content-Type: application/json'"
    return f"""
  Marquee is running: {base}   ({kind}, {bus}, {settings.workers} worker{"s" if settings.workers > 1 else ""})

  Live page {base}/   API {base}/docs   {base}/redoc   {base}/openapi.json
{others}
  Watch, in a second terminal:

    wscat -c ws://{address}/ws

  Write, in a third (paste all four lines together):

    curl {base}/auth/register {json} -d '{{"username": "holly", "password": "third man 1949"}}'
    TOKEN=$(curl -s {base}/token -d 'username=holly&password=third man 1949' | cut -d '"' -f 4)
    curl {base}/movies {json} -H "Authorization: Bearer $TOKEN" -d '{{"title": "The Third Man"}}'
    curl -X POST {base}/movies/generate/1000 -H "Authorization: Bearer $TOKEN"
"""


def server_config(settings: Settings, app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        # uvicorn would trust the proxy headers of every local client; the setting TRUSTED_PROXIES is used instead.
        proxy_headers=False,
        http=MarqueeHTTPProtocol,
        ws=MarqueeWebSocketProtocol,
        ws_max_size=MAX_FRAME_BYTES,
        ws_ping_interval=HEARTBEAT_SECONDS,
        ws_ping_timeout=PING_TIMEOUT_SECONDS,
        # Compressing each frame for each socket would cost more CPU time than all other work together.
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=int(STOP_SECONDS),
        lifespan="on",
    )


class Server(uvicorn.Server):
    """A uvicorn server that stops in the following order and exits with status 0:

    1. For `drain_seconds`, everything is served as before, while `/readyz` tells load balancers to use other servers.
    2. New connections are refused. Websockets are closed with 1012, in batches, so that their clients do not all
       reconnect at the same moment. Idle connections are closed, event streams end, jobs are handed over.
    3. Open requests get REQUEST_SECONDS. After that, they are answered with 503, or aborted if the response has begun.
    4. Background work ends. The process exits within STOP_SECONDS, even when something hangs.

    A second signal skips the waiting.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float = 0.0) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._owns_process = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped. The process may exit within this call, because it has nothing else to do afterwards."""
        self._owns_process = True
        super().run(sockets)
        # Without `gc.freeze`, collecting the remains of thousands of connections would take seconds at exit.
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again after the shutdown, but an orderly shutdown must exit with status 0.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping: Stopping = self.lifespan.state["stopping"]
        stopping.drain()
        await self._drain()
        now = asyncio.get_running_loop().time
        begun = now()
        log.info("shutdown started", connections=len(self.server_state.connections))
        last_resort = threading.Timer(STOP_SECONDS, _exit_now, ["a thread"])
        last_resort.daemon = True
        if self._owns_process:
            last_resort.start()
        stopping.begin()
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        await self._close_connections(begun + REQUEST_SECONDS)
        await self._abort_connections()
        seconds = 1.0 if self.force_exit else begun + STOP_SECONDS - 0.5 - now()
        try:
            await asyncio.wait_for(self.lifespan.shutdown(), seconds)
        except TimeoutError:
            if self._owns_process:
                _exit_now("background work")
        log.info("shutdown finished", seconds=round(now() - begun, 1))

    async def _drain(self) -> None:
        ticks = math.ceil(self._drain_seconds / TICK_SECONDS)
        if ticks:
            log.info("drain started", seconds=self._drain_seconds)
        for tick in range(ticks):
            if self.force_exit:
                return
            await self.on_tick(tick)  # on_tick keeps the Date header up to date
            await asyncio.sleep(TICK_SECONDS)

    async def _close_connections(self, until: float) -> None:
        """Shut down each connection once, including new ones. Return when all are closed, or at the time `until`."""
        connections, tasks = self.server_state.connections, self.server_state.tasks
        now = asyncio.get_running_loop().time
        begun, expected = now(), len(connections)
        shut_down: set[object] = set()
        closed = 0
        while (connections or tasks) and now() < until and not self.force_exit:
            remaining = [connection for connection in connections if connection not in shut_down]
            websockets = [each for each in remaining if isinstance(each, MarqueeWebSocketProtocol)]
            # `due` depends on the elapsed time and not on the number of rounds, which is lower on a busy machine.
            due = math.ceil(expected * (now() - begun + BATCH_SECONDS) / SPREAD_SECONDS)
            batch = max(BATCH_SOCKETS, due - closed)
            later = set(websockets[batch:])
            closed += len(websockets[:batch])
            for connection in remaining:
                if connection not in later:
                    connection.shutdown()
                    shut_down.add(connection)
            await asyncio.sleep(BATCH_SECONDS)

    async def _abort_connections(self) -> None:
        """Abort websockets and connections whose response has begun. Then end the other requests with a 503."""
        connections: set[Any] = set(self.server_state.connections)
        if not connections and not self.server_state.tasks:
            return
        log.warning("open connections aborted", connections=len(connections), tasks=len(self.server_state.tasks))
        # uvicorn logs each response that is aborted here as an error; that is expected.
        uvicorn_log = logging.getLogger("uvicorn.error")
        uvicorn_log.addFilter(_reject)
        try:
            for connection in connections:
                cycle = getattr(connection, "cycle", None)
                if cycle is None or cycle.response_started:
                    connection.transport.abort()
            await self._wait_until_empty(0.1)
            for task in list(self.server_state.tasks):
                task.cancel()
            await self._wait_until_empty(0.5)
            connections = set(self.server_state.connections)
            for connection in connections:
                connection.transport.abort()
            await self._wait_until_empty(0.1)
        finally:
            uvicorn_log.removeFilter(_reject)

    async def _wait_until_empty(self, seconds: float) -> None:
        for _ in range(math.ceil(seconds / 0.01)):
            if not self.server_state.connections and not self.server_state.tasks:
                return
            await asyncio.sleep(0.01)


def _reject(record: logging.LogRecord) -> bool:
    return False


def _exit_now(waiting_for: str) -> NoReturn:
    """Exit without waiting. Nothing is lost: every write that was confirmed is in the database, and leases expire."""
    log.warning("shutdown deadline passed; exiting", waiting_for=waiting_for)
    logging.shutdown()
    os._exit(0)


def serve(settings: Settings, app: Any, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve in this process until a signal stops it. `announce` is called as soon as signals are handled."""
    server = Server(server_config(settings, app), settings.drain_seconds)
    # uvicorn installs its signal handlers later. Until then, Ctrl-C would raise an exception at any point, possibly
    # where Python ignores exceptions, and the signal would be lost.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    announce()
    server.run(sockets=[listener])


def _notice_vanished_peers(listener: socket.socket) -> None:
    """Let the operating system end connections whose peer has vanished without closing them.

    Accepted sockets inherit the options that are set here. A silent connection is probed. A connection with
    unacknowledged data is aborted after VANISHED_SECONDS.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER_SECONDS),
        ("TCP_KEEPALIVE", PROBE_AFTER_SECONDS),  # the name of TCP_KEEPIDLE on macOS
        ("TCP_KEEPINTVL", PROBE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", (VANISHED_SECONDS - PROBE_AFTER_SECONDS) // PROBE_INTERVAL_SECONDS),
        ("TCP_USER_TIMEOUT", VANISHED_SECONDS * 1000),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            with suppress(OSError):  # not every system accepts every option
                listener.setsockopt(socket.IPPROTO_TCP, option, value)


def _keep_little_unsent(listener: socket.socket) -> None:
    """Let the operating system take only UNSENT_BYTES from us that it cannot send yet. Accepted sockets inherit this.

    By default, Linux takes up to 4 MiB for each connection, which no limit for unread data counts.
    """
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None:
        with suppress(OSError):
            listener.setsockopt(socket.IPPROTO_TCP, option, UNSENT_BYTES)


def listen(settings: Settings) -> socket.socket:
    """Open the listening socket. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_vanished_peers(listener)
        _keep_little_unsent(listener)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
        return listener
    except socket.gaierror as error:
        raise SettingsError(f"HOST: {settings.host} is not an address of this machine: {error.strerror}.") from error
    except OSError as error:
        raise SettingsError(f"PORT: cannot listen on {settings.host}:{settings.port}: {error.strerror}.") from error
