"""The limit on open files is raised at the start, and clients cannot use up the files that the database needs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from core.settings import Settings
from server import open_files
from server.open_files import ConnectionLimits, fit
from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import raw_connection
from tests.support.service import ROOT, Service

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
import main
sys.exit(main.run())
"""


def with_open_files(service: Service, soft: int, hard: int) -> Service:
    service.settings["PYTHONPATH"] = str(ROOT)
    service.command = ("-c", LIMITED.format(soft=soft, hard=hard))
    return service


@SQLITE_ONLY
async def test_250_silent_connections_lock_no_client_out_where_256_files_may_be_open(
    new_service: Callable[..., Service],
) -> None:
    service = with_open_files(new_service(RATE_LIMITS="on"), 256, 256).start()
    async with AsyncExitStack() as stack:
        for _ in range(250):
            await stack.enter_async_context(raw_connection(service, address="127.0.0.2"))
        async with service.person() as alice, service.watch() as watcher:
            begun = time.monotonic()
            await watcher.sees(await alice.add())
            assert time.monotonic() - begun < 2
    assert "open files limit too low" in service.log()


@SQLITE_ONLY
async def test_the_limit_of_open_files_is_raised_to_the_hard_limit(new_service: Callable[..., Service]) -> None:
    settings = {"MAX_CONNECTIONS": "300", "MAX_HTTP_CONNECTIONS": "200"}
    service = with_open_files(new_service(**settings), 300, 700).start()
    assert resource.prlimit(service.pid, resource.RLIMIT_NOFILE) == (700, 700)
    assert "open files limit" not in service.log()


def test_limits_are_fitted_to_the_files_that_may_be_open() -> None:
    limits = open_files.wanted(Settings(database_url="sqlite:///x.db"))
    assert limits == ConnectionLimits(10_000, 1_000, 4_000, 500)
    assert fit(limits, 20_000) == limits
    assert fit(limits, -1) == limits
    few = fit(limits, 256)
    assert few.sockets + few.http == 256 - open_files.RESERVED_FILES
    assert (few.sockets_per_address, few.http_per_address) == (few.sockets // 4, few.http // 4)
    none = fit(limits, 10)
    assert min(none.sockets, none.sockets_per_address, none.http, none.http_per_address) == 1
