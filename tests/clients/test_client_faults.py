"""Every feature of each client recovers from every temporary fault without missing or repeating anything.

The cases are generated. Each feature meets each fault twice: on its first message and after it has begun.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from clients.python.marquee_client import Client, Event, Retry
from tests.support.node import node_command
from tests.support.programs import output_of

MODULE = Path(__file__).resolve().parent.parent.parent / "clients" / "javascript" / "marquee.js"
ROUNDS = 3  # rounds with a fault, with a fault after the first item, and without a fault
ERRORS = ("unavailable", "rate_limited")
ENDINGS = ("cut", "1012", "4008", "4429", "restart")
STREAMS = {"watch": "subscribe", "view": "subscribe", "presence": "presence"}
CALLS = {"get": "request", "keyed post": "request", "ping": "ping", "auth": "auth"}
CASES = [
    *itertools.product((*STREAMS, "get", "keyed post"), (*ERRORS, *ENDINGS)),
    *itertools.product(("ping", "auth"), ERRORS),
    ("post", "rate_limited"),
    ("post", "too_many_requests"),
]
EXPECTED = {"watch": [1, 2, 3], "view": [1, 2, 3], "presence": 3, "get": 200, "keyed post": 200, "post": 200}


class Faulty:
    """A server whose `action` meets a fault in every round except the last. Each round shows one more item."""

    def __init__(self, feature: str, fault: str) -> None:
        self.action = {**STREAMS, **CALLS, "post": "request"}[feature]
        self.fault = fault
        self.round = 1
        self.handled = 0
        self.port = 0
        self._server: Server | None = None
        self._restart: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Faulty:
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._restart is not None:
            await self._restart
        await self._stop()

    async def _start(self) -> None:
        self._server = await serve(
            self._talk, "127.0.0.1", self.port,
            select_subprotocol=lambda _, offered: "bearer" if offered else None,  # type: ignore[arg-type, return-value]
        )  # fmt: skip
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close(code=1012)
        await self._server.wait_closed()

    async def _begin_again(self) -> None:
        await self._stop()
        await self._start()

    async def _talk(self, socket: ServerConnection) -> None:
        data = {"protocol": 1, "epoch": "e1", "seq": 0, "user_id": None, "heartbeat_seconds": 20}
        await _say(socket, {"operation": "welcome", "data": data})
        try:
            async for text in socket:
                message = json.loads(text)
                if message["action"] == self.action:
                    await self._meet(socket, message)
                else:
                    await _say(socket, {"reply_to": message["id"], "ok": True, "data": {}})
        except ConnectionClosed:
            return

    async def _meet(self, socket: ServerConnection, message: Mapping[str, Any]) -> None:
        is_stream = self.action in STREAMS.values()
        if self.round < ROUNDS:
            self.round += 1
            if self.fault in (*ERRORS, "too_many_requests"):
                error = {"code": self.fault, "detail": "not now"}
                await _say(socket, {"reply_to": message["id"], "ok": False, "error": error})
                if self.round == ROUNDS and is_stream:
                    socket.transport.abort()
                return
            if is_stream:
                await self._handle(socket, message, self.round - 1)
            await self._end(socket)
            return
        await self._handle(socket, message, ROUNDS)

    async def _handle(self, socket: ServerConnection, message: Mapping[str, Any], head: int) -> None:
        self.handled += 1
        name, since = message.get("as"), message.get("since", 0)
        if self.action == "request":
            await _say(socket, {"reply_to": message["id"], "status": 200, "headers": {}, "body": None})
            return
        data: dict[str, Any] = {"subscription": name, "seq": since}
        if self.action == "presence":
            data = {"movies": {"count": head, "users": []}}
        elif message.get("snapshot") and "since" not in message:
            data["seq"] = since = head - 1
        await _say(socket, {"reply_to": message["id"], "ok": True, "data": data})
        if self.action != "subscribe":
            return
        frame = {"topic": "movies", "subscription": name}
        if message.get("snapshot") and "since" not in message:
            rows = {"items": [{"id": seq} for seq in range(1, since + 1)], "done": True}
            await _say(socket, {**frame, "operation": "snapshot", "seq": since, "data": rows})
        for seq in range(since + 1, head + 1):
            await _say(socket, {**frame, "operation": "add", "seq": seq, "data": {"id": seq}})
        # This event is incomplete when the connection ends, so the next round sends all of it.
        await _say(socket, {**frame, "operation": "add", "seq": head + 1, "data": {"id": head + 1}, "more": True})

    async def _end(self, socket: ServerConnection) -> None:
        if self.fault == "restart":
            self._restart = asyncio.ensure_future(self._begin_again())
        elif self.fault == "cut":
            socket.transport.close()
        else:
            await socket.close(int(self.fault))


async def _say(socket: ServerConnection, frame: Mapping[str, Any]) -> None:
    await socket.send(json.dumps(frame))


async def python_result(feature: str, port: int) -> Any:
    async with Client(f"ws://127.0.0.1:{port}/ws", retry=Retry(0.01, 0.01)) as client, asyncio.timeout(30):
        if feature == "watch":
            seen = []
            async for event in client.watch("movies", since="e1:0"):
                assert isinstance(event, Event)
                seen.append(event.seq)
                if event.seq == ROUNDS:
                    return seen
        if feature == "view":
            async with client.view("movies") as view:
                async for _ in view.changes():
                    if len(view) >= ROUNDS:
                        return sorted(view)
        if feature == "presence":
            async with client.presence("movies") as presence:
                await presence.ready()
                while presence["movies"].count != ROUNDS:
                    await anext(presence.changes())
                return ROUNDS
        if feature == "ping":
            return await client.ping() >= 0
        if feature == "auth":
            return dict(await client.authenticate("token")) == {"subscription": None, "seq": 0}
        if feature == "get":
            return (await client.request("GET", "/movies")).status
        key = "k" if feature == "keyed post" else None
        return (await client.request("POST", "/movies", body={}, idempotency_key=key)).status


JAVASCRIPT = """
async function resultOf(feature, port) {
  const client = new Client(`ws://127.0.0.1:${port}/ws`, { retry: { firstSeconds: 0.01, longestSeconds: 0.01 } });
  try {
    if (feature === "watch") {
      const seen = [];
      for await (const event of client.watch("movies", { since: "e1:0" })) {
        seen.push(event.seq);
        if (event.seq === 3) return seen;
      }
    }
    if (feature === "view") {
      const view = client.view("movies");
      for await (const _ of view.changes()) if (view.size >= 3) return [...view.keys()].sort();
    }
    if (feature === "presence") {
      const presence = client.presence("movies");
      await presence.ready();
      const changes = presence.changes();
      while (presence.get("movies").count !== 3) await changes.next();
      return 3;
    }
    if (feature === "ping") return (await client.ping()) >= 0;
    if (feature === "auth") return (await client.authenticate("token")).seq === 0;
    if (feature === "get") return (await client.request("GET", "/movies")).status;
    const options = { body: {}, ...(feature === "keyed post" ? { idempotencyKey: "k" } : {}) };
    return (await client.request("POST", "/movies", options)).status;
  } catch (error) {
    return String(error);
  } finally {
    client.close();
  }
}
"""


async def javascript_results(cases: list[tuple[str, int]]) -> list[Any]:
    program = (
        f"import {{ Client }} from {json.dumps(MODULE.as_uri())};\n{JAVASCRIPT}\n"
        f"const results = await Promise.all({json.dumps(cases)}.map(([feature, port]) => resultOf(feature, port)));\n"
        "console.log(JSON.stringify(results));\n"
    )
    text = await output_of(*node_command(), "--input-type=module", "--eval", program, seconds=60)
    results: list[Any] = json.loads(text)
    return results


async def python_results(cases: list[tuple[str, int]]) -> list[Any]:
    results = await asyncio.gather(*(python_result(*case) for case in cases), return_exceptions=True)
    return [repr(each) if isinstance(each, BaseException) else each for each in results]


@pytest.mark.parametrize("results_of", [python_results, javascript_results])
async def test_every_feature_continues_after_every_temporary_fault(results_of: Any) -> None:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Faulty(feature, fault)) for feature, fault in CASES]
        features = [feature for feature, _ in CASES]
        results = await results_of([(feature, each.port) for feature, each in zip(features, servers, strict=True)])
    found = dict(zip(CASES, results, strict=True))
    assert found == {(feature, fault): EXPECTED.get(feature, True) for feature, fault in CASES}


async def test_a_watch_resumes_before_the_event_whose_processing_failed() -> None:
    async with Faulty("watch", "cut") as server, Client(f"ws://127.0.0.1:{server.port}/ws") as client:
        watch = client.watch("movies", since="e1:0")
        seen: list[int | None] = []

        async def fail_at_two() -> None:
            async for event in watch:
                assert isinstance(event, Event)
                seen.append(event.seq)
                if event.seq == 2:
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_at_two()
        assert str(watch.position) == "e1:1"
        async for event in client.watch("movies", since=watch.position):
            assert isinstance(event, Event)
            seen.append(event.seq)
            if event.seq == ROUNDS:
                break
        assert seen == [1, 2, 2, 3]
    async with Faulty("watch", "cut") as server:
        program = f"""
            import {{ Client }} from {json.dumps(MODULE.as_uri())};
            const client = new Client("ws://127.0.0.1:{server.port}/ws");
            const watch = client.watch("movies", {{ since: "e1:0" }});
            const seen = [];
            try {{
              for await (const {{ seq }} of watch) {{
                seen.push(seq);
                if (seq === 2) throw new Error("failed");
              }}
            }} catch {{
              seen.push(`${{watch.position.epoch}}:${{watch.position.seq}}`);
            }}
            for await (const {{ seq }} of client.watch("movies", {{ since: watch.position }})) {{
              seen.push(seq);
              if (seq === 3) break;
            }}
            client.close();
            console.log(JSON.stringify(seen));
        """
        told = json.loads(await output_of(*node_command(), "--input-type=module", "--eval", program, seconds=30))
        assert told == [1, 2, "e1:1", 2, 3]
