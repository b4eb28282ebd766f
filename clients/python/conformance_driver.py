"""The driver of the Python client for the conformance suite.

    python -m clients.conformance -- python -m clients.python.conformance_driver

clients/conformance/README.md describes the commands and the report.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from websockets.asyncio.client import connect

from .marquee_client import (
    Client,
    ClientClosed,
    ConnectionLost,
    Forbidden,
    MarqueeError,
    Presence,
    ProtocolViolation,
    Refused,
    Retry,
    ServerError,
    Unauthorized,
    View,
    Watch,
)

CAPABILITIES = ["handshake_status"]  # the Python client sees why a handshake was refused
KINDS: tuple[tuple[type[MarqueeError], str], ...] = (
    (Unauthorized, "unauthorized"),
    (Forbidden, "forbidden"),
    (ProtocolViolation, "protocol_violation"),
    (Refused, "refused"),
    (ServerError, "server_error"),
    (ConnectionLost, "connection_lost"),
    (ClientClosed, "closed"),
)


def described(error: MarqueeError) -> Mapping[str, Any]:
    kind = next((kind for type_, kind in KINDS if isinstance(error, type_)), "other")
    return {"kind": kind, "code": getattr(error, "code", None), "message": str(error)}


class Reading:
    """Reads a watch, a view or a presence to its end."""

    def __init__(self, opened: Watch | View | Presence) -> None:
        self.opened = opened
        self.error: Mapping[str, Any] | None = None
        self.is_ready = False

    async def wait(self) -> None:
        with suppress(MarqueeError):
            await self.opened.ready()
            self.is_ready = True

    async def run(self) -> None:
        try:
            await self.read()
            self.error = described(ClientClosed())
        except MarqueeError as error:
            self.error = described(error)

    async def read(self) -> None:
        raise NotImplementedError

    def report(self) -> Mapping[str, Any]:
        raise NotImplementedError


class WatchReading(Reading):
    def __init__(self, watch: Watch, is_slow: bool) -> None:
        super().__init__(watch)
        self.watch = watch
        self.events: list[Mapping[str, Any]] = []
        self.may_read = asyncio.Event()
        if not is_slow:
            self.may_read.set()

    async def read(self) -> None:
        async with self.watch:
            await self.may_read.wait()
            async for item in self.watch:
                self.events.append({**asdict(item), "operation": item.operation, "position": str(item.position)})

    def report(self) -> Mapping[str, Any]:
        seqs = [event["seq"] for event in self.events if event.get("seq") is not None]
        return {
            "events": self.events if len(self.events) < 1000 else None,
            "count": len(self.events),
            "in_order": all(one < other for one, other in itertools.pairwise(seqs)),
            "ready": self.is_ready,
            "position": str(self.watch.position) if self.watch.position else None,
            "error": self.error,
        }


class ViewReading(Reading):
    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.view = view
        self.changes: list[Any] = []

    async def read(self) -> None:
        async for change in self.view.changes():
            self.changes.append([change.kind, change.id])

    def report(self) -> Mapping[str, Any]:
        try:
            rows = [self.view[key] for key in sorted(self.view, key=lambda key: (isinstance(key, str), key))]
        except MarqueeError:
            rows = []
        return {
            "rows": rows,
            "ready": self.is_ready,
            "live": self.view.is_live,
            "position": str(self.view.position) if self.view.position else None,
            "changes": self.changes,
            "error": self.error,
        }


class PresenceReading(Reading):
    def __init__(self, presence: Presence) -> None:
        super().__init__(presence)
        self.presence = presence
        self.changes: list[Any] = []

    async def read(self) -> None:
        async for change in self.presence.changes():
            self.changes.append(asdict(change))

    def report(self) -> Mapping[str, Any]:
        state = {
            topic: {"count": audience.count, "users": list(audience.users.values())}
            for topic, audience in self.presence.items()
        }
        return {"state": state, "changes": self.changes, "error": self.error}


class Subject:
    """A client under test and everything opened with it."""

    def __init__(self, command: Mapping[str, Any]) -> None:
        self.tokens_asked = 0
        self._tokens = command.get("token")
        token = self._next_token if isinstance(self._tokens, list) else self._tokens
        self.client = Client(command["url"], token=token, retry=Retry(**command.get("retry", {})))
        self.readings: dict[str, dict[str, Reading]] = {"watches": {}, "views": {}, "presence": {}}
        self.requests: dict[str, Mapping[str, Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def _next_token(self) -> str | None:
        assert isinstance(self._tokens, list)
        token: str = self._tokens[min(self.tokens_asked, len(self._tokens) - 1)]
        self.tokens_asked += 1
        return token

    def _start(self, *works: Coroutine[Any, Any, None]) -> None:
        self._tasks.update(map(asyncio.create_task, works))

    def _read(self, group: str, name: str, reading: Reading) -> None:
        self.readings[group][name] = reading
        self._start(reading.run(), reading.wait())

    async def do_watch(self, command: Mapping[str, Any]) -> None:
        options = {
            name: command[name] for name in ("filter", "q", "bulk", "deliver", "since", "epoch") if name in command
        }
        watch = self.client.watch(command["topics"], **options)
        self._read("watches", command["name"], WatchReading(watch, command.get("slow", False)))

    async def do_view(self, command: Mapping[str, Any]) -> None:
        options = {name: command[name] for name in ("filter", "q", "deliver") if name in command}
        self._read("views", command["name"], ViewReading(self.client.view(command["topic"], **options)))

    async def do_presence(self, command: Mapping[str, Any]) -> None:
        self._read("presence", command["name"], PresenceReading(self.client.presence(command["topics"])))

    async def do_request(self, command: Mapping[str, Any]) -> None:
        self.requests[command["name"]] = {"pending": True}

        async def ask() -> None:
            options = {name: command[name] for name in ("body", "headers", "idempotency_key") if name in command}
            try:
                answer = await self.client.request(command["method"], command["path"], **options)
                self.requests[command["name"]] = asdict(answer)
            except MarqueeError as error:
                self.requests[command["name"]] = {"error": described(error)}

        self._start(ask())

    async def do_ping(self, command: Mapping[str, Any]) -> float | None:
        """Ping the server. Return the round-trip time, or None if the client has ended or the connection was lost."""
        try:
            return await self.client.ping()
        except MarqueeError:
            return None

    async def do_authenticate(self, command: Mapping[str, Any]) -> Any:
        return await self.client.authenticate(command["token"])

    async def do_go_on(self, command: Mapping[str, Any]) -> None:
        reading = self.readings["watches"][command["name"]]
        assert isinstance(reading, WatchReading)
        reading.may_read.set()

    async def do_end(self, command: Mapping[str, Any]) -> None:
        next(group[command["name"]] for group in self.readings.values() if command["name"] in group).opened.close()

    async def do_report(self, command: Mapping[str, Any]) -> Mapping[str, Any]:
        reports = {
            group: {name: each.report() for name, each in readings.items()} for group, readings in self.readings.items()
        }
        return {**reports, "requests": self.requests, "tokens_asked": self.tokens_asked}

    async def do_close(self, command: Mapping[str, Any]) -> None:
        await self.client.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def main(control: str) -> None:
    subjects: dict[str, Subject] = {}
    async with connect(control, max_size=None, ping_interval=None, compression=None) as socket:
        await socket.send(json.dumps({"hello": {"capabilities": CAPABILITIES}}))

        async def carry_out(message: Mapping[str, Any]) -> None:
            answer: dict[str, Any] = {"reply_to": message["id"]}
            try:
                if message["do"] == "open":
                    subjects[message["client"]] = Subject(message)
                else:
                    subject = subjects[message["client"]]
                    act: Callable[[Mapping[str, Any]], Awaitable[Any]] = getattr(subject, f"do_{message['do']}")
                    answer["result"] = await act(message)
                    if message["do"] == "close":
                        del subjects[message["client"]]
            except Exception as error:  # noqa: BLE001 (reported to the runner)
                answer["error"] = repr(error)
            await socket.send(json.dumps(answer))

        async with asyncio.TaskGroup() as tasks:
            async for text in socket:
                tasks.create_task(carry_out(json.loads(text)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
