"""A service that runs in the test's own event loop, so that the test can change its constants and inspect it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import main
from core.settings import load_settings
from server import serving
from tests.support.service import Service, eventually


@asynccontextmanager
async def served_here(service: Service, **options: Any) -> AsyncIterator[serving.Server]:
    """Run the service like `python main.py`, but with `options` for uvicorn."""
    values: dict[str, Any] = {name.lower(): value for name, value in service.settings.items()}
    settings = load_settings(**values)
    config = serving.server_config(settings, main.build_app(settings))
    for name, value in options.items():
        setattr(config, name, value)
    server = serving.Server(config)
    listener = serving.listen(settings)
    life = asyncio.create_task(server.serve(sockets=[listener]))
    await eventually(lambda: server.started, "the service starts")
    yield server
    server.should_exit = True
    await life
