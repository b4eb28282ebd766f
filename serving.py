"""Listening and serving with uvicorn: what stands between the operating system and the application."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from errors import SettingsError
from realtime.endpoint import HEARTBEAT_SECONDS
from realtime.subscription import SLOW_CLIENT_SECONDS
from realtime.websocket_protocol import MarqueeWebSocketProtocol
from settings import Settings

MAX_FRAME_BYTES = 256 * 1024  # of a client's message
PING_TIMEOUT_SECONDS = SLOW_CLIENT_SECONDS + 15  # a slow reader is first told so by its own close code
STOP_SECONDS = 10


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
        ws=MarqueeWebSocketProtocol,
        ws_max_size=MAX_FRAME_BYTES,
        ws_ping_interval=HEARTBEAT_SECONDS,
        ws_ping_timeout=PING_TIMEOUT_SECONDS,
        # Compressing each frame for each socket would cost more than everything else together.
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        lifespan="on",
    )


class Server(uvicorn.Server):
    """Ends with status 0 when told to stop: uvicorn would raise the signal again after an orderly stop."""

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super()._serve(sockets)
        self._captured_signals.clear()


def serve(
    settings: Settings,
    prepare: Callable[[Settings], Coroutine[Any, Any, None]],
    build_app: Callable[[Settings], Any],
    *,
    worker_app: str,
) -> None:
    """Listen and serve until told to stop. Raises SettingsError when a setting turns out not to work.

    `worker_app` is where several workers, each a process of its own, import the application from.
    """
    asyncio.run(prepare(settings))
    listener = listen(settings)
    port = listener.getsockname()[1]
    print(banner(settings, port), flush=True)
    if settings.workers > 1:
        config = server_config(settings, worker_app)
        listener.set_inheritable(True)
        # The supervisor's own lines, such as that a worker died; the workers set up their own loggers.
        logging.getLogger("uvicorn.error").setLevel(settings.log_level.upper())
        Multiprocess(config, sockets=[listener]).run()
    else:
        Server(server_config(settings, build_app(settings))).run(sockets=[listener])


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
