"""The runner's connection to a driver. A driver is a program that carries out commands with the client under test."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

START_SECONDS = 60.0  # long enough for a browser to start on a busy machine
ANSWER_SECONDS = 30.0


class DriverFailed(Exception):
    """The driver could not carry out a command, or has exited, because of a bug in the driver."""


class Driver:
    """The runner's side of the control socket."""

    def __init__(self) -> None:
        self.capabilities: frozenset[str] = frozenset()
        self._socket: ServerConnection | None = None
        self._here = asyncio.Event()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def ready(self) -> None:
        await self._here.wait()

    async def serve(self, socket: ServerConnection) -> None:
        """Receive the message `{"hello": {"capabilities": […]}}`, then replies until the driver disconnects."""
        hello = json.loads(await socket.recv())
        self.capabilities = frozenset(hello["hello"]["capabilities"])
        self._socket = socket
        self._here.set()
        try:
            async for text in socket:
                self._answer(json.loads(text))
        except ConnectionClosed:
            pass
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(DriverFailed("the driver disconnected"))

    def _answer(self, message: Mapping[str, Any]) -> None:
        answer = self._answers.pop(message["reply_to"], None)
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(DriverFailed(message["error"]))
        else:
            answer.set_result(message.get("result"))

    async def tell(self, client: str, **command: Any) -> Any:
        """Send a command for a client and return its result. Raises DriverFailed."""
        assert self._socket is not None
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        await self._socket.send(json.dumps({"id": number, "client": client, **command}))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except TimeoutError:
            raise DriverFailed(f"the driver did not reply to {command} within {ANSWER_SECONDS:.0f} s") from None


@asynccontextmanager
async def started(command: Sequence[str], driver: Driver, *, control: str, page: str) -> AsyncIterator[None]:
    """Run the driver's process. Raises DriverFailed if the driver does not connect.

    In `command`, {control} is replaced by the URL of the control socket, {page} by the URL of the page for browsers and
    {folder} by the path of an empty folder. If neither {control} nor {page} occurs, the URL of the control socket is
    appended.
    """
    folder = await asyncio.to_thread(tempfile.mkdtemp, prefix="conformance-")
    words = [word.format(control=control, page=page, folder=folder) for word in command]
    if not any("{control}" in word or "{page}" in word for word in command):
        words.append(control)
    log = Path(folder).with_suffix(".log")
    try:
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        ended = asyncio.create_task(process.wait())
        here = asyncio.create_task(driver.ready())
        try:
            await asyncio.wait((ended, here), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not here.done():
                state = f"exit status {process.returncode}" if ended.done() else "it did not connect"
                raise DriverFailed(f"{words[0]}: {state}\n{log.read_text(errors='replace')[-4000:]}")
            yield
        finally:
            here.cancel()
            _kill(process.pid)
            await ended
    finally:
        log.unlink(missing_ok=True)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _kill(group: int) -> None:
    """Kill the whole process group, because a browser has many processes."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
