"""Listening and serving with uvicorn: what stands between the operating system and the application."""

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
from types import FrameType
from typing import Any, NoReturn

import structlog
import uvicorn

from core.errors import SettingsError
from core.settings import Settings
from core.stopping import Stopping
from realtime.fanout.subscription import SLOW_CLIENT_SECONDS
from realtime.sockets.endpoint import HEARTBEAT_SECONDS
from schemas import MAX_BODY_BYTES
from server.http_protocol import MarqueeHTTPProtocol
from server.websocket_protocol import MarqueeWebSocketProtocol

MAX_FRAME_BYTES = MAX_BODY_BYTES  # of a client's message
PING_TIMEOUT_SECONDS = SLOW_CLIENT_SECONDS + 15  # a slow reader is first told so by its own close code
STOP_SECONDS = 10.0
REQUEST_SECONDS = 7.0  # of them: for open requests
BATCH_SOCKETS = 100  # closed at once
BATCH_SECONDS = 0.05
SPREAD_SECONDS = 2.5  # over which all sockets are closed, however many: the batches grow
TICK_SECONDS = 0.1

log = structlog.get_logger("serving")


def banner(settings: Settings, port: int) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    shown = "127.0.0.1" if host in ("0.0.0.0", "[::]") else host  # noqa: S104
    base = f"http://{shown}:{port}"
    kind = "SQLite" if settings.sqlite_path else "PostgreSQL"
    bus = "Redis" if settings.has_shared_bus else "in-memory bus"
    json = "-H 'Content-Type: application/json'"
    return f"""
  Marquee is on air: {base}   ({kind}, {bus}, {settings.workers} worker{"s" if settings.workers > 1 else ""})

  Live page {base}/   API {base}/docs   {base}/redoc   {base}/openapi.json

  Watch, in a second terminal:

    wscat -c ws://{shown}:{port}/ws

  Write, in a third (all four lines can be pasted at once):

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
        # By default uvicorn believes whatever comes from this machine; who is believed is `TRUSTED_PROXIES`.
        proxy_headers=False,
        http=MarqueeHTTPProtocol,
        ws=MarqueeWebSocketProtocol,
        ws_max_size=MAX_FRAME_BYTES,
        ws_ping_interval=HEARTBEAT_SECONDS,
        ws_ping_timeout=PING_TIMEOUT_SECONDS,
        # Compressing each frame for each socket would cost more than everything else together.
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=int(STOP_SECONDS),
        lifespan="on",
    )


class Server(uvicorn.Server):
    """Stops in this order, and ends with status 0:

    1. For `drain_seconds`, everything is served as before, while `/readyz` tells load balancers to go elsewhere.
    2. No more connections are taken. Websockets are closed with 1012, some at a time, so that their clients do not all
       come back in one instant; idle connections are closed, event streams end, jobs are handed over.
    3. Open requests have until `REQUEST_SECONDS`, then they are answered with 503, or cut when the answer had begun.
    4. What works in the background ends. Whatever hangs then is left behind: the process ends within `STOP_SECONDS`.

    Told again, it does not wait for anybody.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float = 0.0) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._owns_process = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. The process has nothing else to do afterwards, and may be ended from in here."""
        self._owns_process = True
        super().run(sockets)
        # Looking through the remains of thousands of connections once more, as the interpreter does at its end, takes
        # seconds.
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # The signal is not kept to be raised again afterwards, as uvicorn does: an orderly stop is status 0.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping: Stopping = self.lifespan.state["stopping"]
        stopping.drain()
        await self._serve_on()
        now = asyncio.get_running_loop().time
        begun = now()
        log.info("stopping", connections=len(self.server_state.connections))
        last_resort = threading.Timer(STOP_SECONDS, _leave_behind, ["a thread"])
        last_resort.daemon = True
        if self._owns_process:
            last_resort.start()
        stopping.begin()
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        await self._close_connections(begun + REQUEST_SECONDS)
        await self._cut_connections()
        left = 1.0 if self.force_exit else begun + STOP_SECONDS - 0.5 - now()
        try:
            await asyncio.wait_for(self.lifespan.shutdown(), left)
        except TimeoutError:
            if self._owns_process:
                _leave_behind("background work")
        log.info("stopped", seconds=round(now() - begun, 1))

    async def _serve_on(self) -> None:
        ticks = math.ceil(self._drain_seconds / TICK_SECONDS)
        if ticks:
            log.info("not ready any more; serving on", seconds=self._drain_seconds)
        for tick in range(ticks):
            if self.force_exit:
                return
            await self.on_tick(tick)  # the Date header
            await asyncio.sleep(TICK_SECONDS)

    async def _close_connections(self, until: float) -> None:
        """Tell each connection once, those that are opened meanwhile, too, and wait for all of them."""
        connections, tasks = self.server_state.connections, self.server_state.tasks
        now = asyncio.get_running_loop().time
        begun, expected = now(), len(connections)
        told: set[object] = set()
        closed = 0
        while (connections or tasks) and now() < until and not self.force_exit:
            untold = [connection for connection in connections if connection not in told]
            websockets = [each for each in untold if isinstance(each, MarqueeWebSocketProtocol)]
            # A busy machine makes fewer steps: by the time that has passed, not by their number.
            due = math.ceil(expected * (now() - begun + BATCH_SECONDS) / SPREAD_SECONDS)
            batch = max(BATCH_SOCKETS, due - closed)
            later = set(websockets[batch:])
            closed += len(websockets[:batch])
            for connection in untold:
                if connection not in later:
                    connection.shutdown()
                    told.add(connection)
            await asyncio.sleep(BATCH_SECONDS)

    async def _cut_connections(self) -> None:
        """What is left at the end. Cutting first: an answer that has begun cannot become another one."""
        connections: set[Any] = set(self.server_state.connections)
        if not connections and not self.server_state.tasks:
            return
        log.warning("cutting what is open", connections=len(connections), tasks=len(self.server_state.tasks))
        # What uvicorn has to say of answers without an end is known, and no error.
        uvicorn_log = logging.getLogger("uvicorn.error")
        uvicorn_log.addFilter(_nothing)
        try:
            for connection in connections:
                cycle = getattr(connection, "cycle", None)
                if cycle is None or cycle.response_started:
                    connection.transport.abort()
            await self._all_gone(0.1)
            for task in list(self.server_state.tasks):
                task.cancel()
            await self._all_gone(0.5)
            connections = set(self.server_state.connections)
            for connection in connections:
                connection.transport.abort()
            await self._all_gone(0.1)
        finally:
            uvicorn_log.removeFilter(_nothing)

    async def _all_gone(self, seconds: float) -> None:
        for _ in range(math.ceil(seconds / 0.01)):
            if not self.server_state.connections and not self.server_state.tasks:
                return
            await asyncio.sleep(0.01)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _leave_behind(what: str) -> NoReturn:
    """Nothing is lost by it: what was answered is in the database, and leases run out by themselves."""
    log.warning("the stop has taken its time; the process ends without waiting longer", waiting_for=what)
    logging.shutdown()
    os._exit(0)


def serve(settings: Settings, app: Any, listener: socket.socket, announce: Callable[[], None]) -> None:
    """In this process, until told to stop. Whoever has read what `announce` says may tell it so."""
    server = Server(server_config(settings, app), settings.drain_seconds)
    # From now on, and not only when uvicorn listens to signals: until then Ctrl-C would be an exception that may come
    # anywhere, also where Python ignores exceptions, and the signal would be lost.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    announce()
    server.run(sockets=[listener])


def listen(settings: Settings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
        return listener
    except socket.gaierror as error:
        raise SettingsError(f"HOST: {settings.host} is not an address of this machine: {error.strerror}.") from error
    except OSError as error:
        raise SettingsError(f"PORT: cannot listen on {settings.host}:{settings.port}: {error.strerror}.") from error
