"""Run every scenario against one client."""

from __future__ import annotations

import asyncio
import itertools
import mimetypes
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from .driver import Driver, DriverFailed, started
from .scenario import Scenario, Step, difference
from .server import ScriptedServer, refusal, token_of

SCENARIO_SECONDS = 12.0
SETTLE_SECONDS = 6.0  # after the end of the script, the report must be as expected within this time
POLL_SECONDS = 0.01
AT_ONCE = 6
MAX_FRAME_BYTES = 64 * 1024 * 1024  # reports contain whole views
FILES = Path(__file__).resolve().parent.parent / "javascript"
PAGE = "conformance.html"
# The pauses between attempts are short, so that a whole run takes only seconds.
RETRY: Mapping[str, float] = {"first_seconds": 0.02, "longest_seconds": 0.2, "proven_seconds": 5.0}


class Runner:
    """Serves the control socket, the page for browsers and the scripted servers on one port of 127.0.0.1."""

    def __init__(self, server: Server, driver: Driver, scripts: dict[str, ScriptedServer]) -> None:
        self.driver = driver
        self._scripts = scripts
        self._port: int = next(iter(server.sockets)).getsockname()[1]
        self._clients = itertools.count(1)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def new_client(self) -> str:
        return f"c{next(self._clients)}"

    async def run(self, scenario: Scenario) -> str | None:
        """Run a scenario. Return a description of the first violation, or None. Raises DriverFailed."""
        client = self.new_client()

        async def act(step: Step) -> None:
            if "do" in step:
                await self.driver.tell(client, **step)
            else:
                await self._until(client, step["await"])

        script = ScriptedServer(scenario, act)
        path = f"/scenario/{client}/ws"
        self._scripts[path] = script
        options = {"token": None, "retry": dict(RETRY), **(scenario.client or {})}
        try:
            async with asyncio.timeout(SCENARIO_SECONDS):
                url = f"ws://127.0.0.1:{self._port}{path}"
                await self.driver.tell(client, do="open", url=url, **options)
                for step in scenario.start:
                    await act(step)
                await script.done.wait()
            if script.violation is None:
                await self._settle(client, scenario)
        except TimeoutError:
            report = await self.driver.tell(client, do="report")
            what = difference(dict(scenario.expect), report)
            script.violation = script.violation or f"stuck at {script.at}; {what}"
        finally:
            await self.driver.tell(client, do="close")
            await script.closed()
            del self._scripts[path]
        return script.violation

    async def _settle(self, client: str, scenario: Scenario) -> None:
        """Wait until the report is as expected. Then send a ping, so that all frames have arrived, and wait again.

        Raises TimeoutError.
        """
        async with asyncio.timeout(SETTLE_SECONDS):
            await self._until(client, scenario.expect)
            if (await self.driver.tell(client, do="ping")) is not None:
                await self._until(client, scenario.expect)

    async def _until(self, client: str, expected: Mapping[str, Any]) -> None:
        while True:
            report = await self.driver.tell(client, do="report")
            if difference(dict(expected), report) is None:
                return
            await asyncio.sleep(POLL_SECONDS)


@asynccontextmanager
async def running(command: Sequence[str]) -> AsyncIterator[Runner]:
    """Run a server and a driver, and yield their runner. Raises DriverFailed if the driver does not start."""
    driver = Driver()
    scripts: dict[str, ScriptedServer] = {}

    async def refuse(socket: ServerConnection, request: Request) -> Response | None:
        path = urlsplit(request.path).path
        if path in scripts:
            return scripts[path].refuse(token_of(request))
        return None if path == "/control" else _file(path)

    async def handle(socket: ServerConnection) -> None:
        assert socket.request is not None
        path = urlsplit(socket.request.path).path
        if path == "/control":
            await driver.serve(socket)
        else:
            await scripts[path].serve(socket, token_of(socket.request))

    def subprotocol(socket: ServerConnection, offered: Sequence[str]) -> Any:
        return "bearer" if "bearer" in offered else None

    async with serve(
        handle,
        "127.0.0.1",
        0,
        process_request=refuse,
        select_subprotocol=subprotocol,
        compression=None,
        ping_interval=None,
        close_timeout=1,
        max_size=MAX_FRAME_BYTES,
        max_queue=None,
    ) as server:
        runner = Runner(server, driver, scripts)
        control = f"{runner.origin.replace('http', 'ws')}/control"
        page = f"{runner.origin}/{PAGE}?control={control}"
        async with started(command, driver, control=control, page=page):
            yield runner


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    problem: str | None
    is_left_out: bool = False  # skipped, because the client lacks a required capability


async def run_all(
    runner: Runner, scenarios: Sequence[Scenario], tell: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Run all scenarios, AT_ONCE of them at a time because they mostly wait. Return their outcomes in order."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(scenario: Scenario) -> Outcome:
        if scenario.needs is not None and scenario.needs not in runner.driver.capabilities:
            outcome = Outcome(scenario.name, None, is_left_out=True)
        else:
            async with places:
                try:
                    outcome = Outcome(scenario.name, await runner.run(scenario))
                except DriverFailed as failed:
                    outcome = Outcome(scenario.name, f"the driver failed: {failed}")
        tell(outcome)
        return outcome

    return list(await asyncio.gather(*map(one, scenarios)))


def _file(path: str) -> Response:
    """Return a response with a file of the JavaScript client, for browsers."""
    found = FILES / path.lstrip("/")
    if found.parent != FILES or not found.is_file():
        return refusal(404, {}, f"file not found: {path}")
    kind, body = mimetypes.guess_type(found.name)[0] or "text/javascript", found.read_bytes()
    fields = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
    return Response(200, "OK", Headers({**fields, "Cache-Control": "no-store"}), body)
