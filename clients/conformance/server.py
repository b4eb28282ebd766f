"""A websocket server that follows the script of a scenario, on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from .scenario import Scenario, Step, difference

EPOCH = "e1"
CLOSE_SECONDS = 5.0  # The connections of a closed client must end within this time.
LOG_BATCH = 50  # After this many frames, the client's messages are handled.


class Violated(Exception):
    """The client did something that the scenario does not allow."""


class ScriptedServer:
    """All connections of one scenario. `act` carries out the steps `do` and `await`, which concern the driver."""

    def __init__(self, scenario: Scenario, act: Callable[[Step], Awaitable[None]]) -> None:
        self.scenario = scenario
        self.act = act
        self.violation: str | None = None
        self.at: Step | None = None  # The most recently started step.
        self.done = asyncio.Event()  # `done` is set when every script has ended, or at the first violation.
        self._serving: set[asyncio.Task[None]] = set()
        self._next = 0
        self._ended = 0
        if not scenario.connections:
            self.done.set()

    def refuse(self, token: str | None) -> Response | None:
        """Return a rejection of the handshake if the token is invalid or the script requires a rejection, else None."""
        if token is not None and self.scenario.tokens is not None and token not in self.scenario.tokens:
            return refusal(401, {"WWW-Authenticate": "Bearer"}, "invalid token")
        first = self._script()[0]
        if "refuse" not in first:
            return None
        self._next += 1
        self._end()
        return refusal(first["refuse"], first.get("headers", {}), first.get("detail", "not now"))

    async def closed(self) -> None:
        """Wait for the connections of a closed client to end. Connections that stay open are a violation."""
        if self._serving:
            _, open_still = await asyncio.wait(self._serving, timeout=CLOSE_SECONDS)
            if open_still:
                self._violate(f"{len(open_still)} connections are still open after `close`")

    async def serve(self, socket: ServerConnection, token: str | None) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        steps, is_counted = self._script(), self._next < len(self.scenario.connections)
        self._next += 1
        connection = ScriptedConnection(self, socket, token)
        reader = asyncio.create_task(connection.read())
        try:
            await connection.run(steps)
        except Violated as violated:
            self._violate(f"connection {self._next}: {violated}")
        except ConnectionClosed as closed:
            self._violate(f"connection {self._next}: the client disconnected in the middle of the script ({closed})")
        else:
            if is_counted:
                self._end()
            await socket.wait_closed()
        finally:
            reader.cancel()
            await asyncio.gather(reader, connection.stop(), return_exceptions=True)
        if connection.inbox and self.violation is None:
            self._violate(f"unexpected message {json.dumps(connection.inbox[0])}")

    def _script(self) -> Sequence[Step]:
        if self._next < len(self.scenario.connections):
            return self.scenario.connections[self._next]
        if self.scenario.otherwise is None:
            self._violate(f"unexpected connection {self._next + 1}")
        return self.scenario.otherwise or [{"close": 1000}]

    def _end(self) -> None:
        self._ended += 1
        if self._ended == len(self.scenario.connections):
            self.done.set()

    def _violate(self, what: str) -> None:
        self.violation = self.violation or what
        self.done.set()


class ScriptedConnection:
    def __init__(self, server: ScriptedServer, socket: ServerConnection, token: str | None) -> None:
        self.inbox: list[Mapping[str, Any]] = []
        self._server = server
        self._socket = socket
        self._token = token
        self._bound: dict[str, Mapping[str, Any]] = {}  # the client's messages by the names that the script gives them
        self._arrived = asyncio.Event()
        self._answers_pings = True
        self._pings = 0
        self._ended = False
        self._made_names = 0
        self._background: asyncio.Task[None] | None = None

    async def read(self) -> None:
        try:
            async for text in self._socket:
                await self._message(json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            self._ended = True
            self._arrived.set()

    async def _message(self, message: Mapping[str, Any]) -> None:
        if message.get("action") == "ping":
            self._pings += 1
            if self._answers_pings:
                await self._reply(message, {})
        elif message.get("action") == "auth" and self._server.scenario.tokens is not None:
            await self._auth(message)
        else:
            self.inbox.append(message)
        self._arrived.set()

    async def _auth(self, message: Mapping[str, Any]) -> None:
        if message["token"] in (self._server.scenario.tokens or ()):
            self._token = message["token"]
            await self._reply(message, {"user_id": 1, "group": "user"})
        else:
            await self._refuse(message, {"code": "unauthenticated", "detail": "invalid token"})
            await self._socket.close(4501, "token expired, revoked or invalid: sign in again")

    async def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._server.at = step
            kind = next(iter(step))
            await getattr(self, f"_step_{kind}")(step)

    async def stop(self) -> None:
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)

    async def _send(self, frame: Mapping[str, Any]) -> None:
        await self._socket.send(json.dumps(frame))

    async def _reply(self, message: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        await self._send({"reply_to": message.get("id"), "ok": True, "data": data})

    async def _refuse(self, message: Mapping[str, Any], error: Mapping[str, Any]) -> None:
        await self._send({"reply_to": message.get("id"), "ok": False, "error": error})

    async def _until(self, holds: Callable[[], object], what: str) -> None:
        while not holds():
            if self._ended:
                raise Violated(f"expected {what}, but the connection ended; got {json.dumps(self.inbox)}")
            self._arrived.clear()
            await self._arrived.wait()

    # --- steps

    async def _step_welcome(self, step: Step) -> None:
        data = {"protocol": 1, "epoch": EPOCH, "seq": 0, "user_id": None, "heartbeat_seconds": 20, **step["welcome"]}
        await self._send({"operation": "welcome", "data": data})

    async def _step_token(self, step: Step) -> None:
        """Wait until the client has sent this token, in the handshake or in a message."""
        await self._until(lambda: self._token == step["token"], f"the token {step['token']}")

    async def _step_expect(self, step: Step) -> None:
        """Wait for a message that has the members of `expect`. It must lack those of `absent`. `as` names it."""

        def matching() -> Mapping[str, Any] | None:
            return next((each for each in self.inbox if difference(step["expect"], each) is None), None)

        await self._until(matching, json.dumps(step["expect"]))
        message = matching()
        assert message is not None
        for name in step.get("absent", ()):
            if message.get(name):
                raise Violated(f"expected a message without {name}, got {json.dumps(message)}")
        self.inbox.remove(message)
        self._bound[step.get("as", "")] = message

    async def _step_expect_nothing(self, step: Step) -> None:
        if self.inbox:
            raise Violated(f"expected nothing, got {json.dumps(self.inbox[0])}")

    async def _step_reply(self, step: Step) -> None:
        """Reply to a message. The reply to `subscribe` also carries the name of the subscription."""
        message = self._bound[step["to"]]
        data = dict(step["reply"])
        if message["action"] == "subscribe":
            data["subscription"] = self._name(step["to"])
        await self._reply(message, data)

    async def _step_reply_error(self, step: Step) -> None:
        await self._refuse(self._bound[step["to"]], step["reply_error"])

    async def _step_answer(self, step: Step) -> None:
        await self._send({"reply_to": self._bound[step["to"]]["id"], **step["answer"]})

    async def _step_send(self, step: Step) -> None:
        await self._send(self._frame(step["send"], step))

    async def _step_send_half(self, step: Step) -> None:
        """Send the first half of a websocket frame."""
        payload = json.dumps(self._frame(step["send_half"], step)).encode()
        assert 126 <= len(payload) < 65536
        self._socket.transport.write(
            bytes((0x81, 126)) + len(payload).to_bytes(2, "big") + payload[: len(payload) // 2]
        )

    async def _step_close(self, step: Step) -> None:
        await self._socket.close(step["close"], step.get("reason", ""))

    async def _step_cut(self, step: Step) -> None:
        """Abort the connection without a close frame."""
        await self._sent()
        self._socket.transport.abort()

    async def _step_silent(self, step: Step) -> None:
        self._answers_pings = False

    async def _step_pings(self, step: Step) -> None:
        await self._until(lambda: self._pings >= step["pings"], f"{step['pings']} pings")

    async def _step_wait_end(self, step: Step) -> None:
        """Wait until the client ends the connection."""
        await self._socket.wait_closed()

    async def _step_do(self, step: Step) -> None:
        await self._server.act(step)

    _step_await = _step_do

    async def _step_log(self, step: Step) -> None:
        """Start serving any number of subscriptions from a log that consists of the `add` events 1 to n."""
        self._background = asyncio.create_task(self._follow_log(step["log"]))

    async def _follow_log(self, last: int) -> None:
        places: dict[str, int] = {}
        while not self._ended:
            self._arrived.clear()
            for message in list(self.inbox):
                self.inbox.remove(message)
                name = message.get("as") or message.get("subscription") or "s1"
                data = {"subscription": name}
                if message["action"] == "subscribe":
                    places[name] = data["seq"] = message.get("since", 0)
                else:
                    places.pop(name, None)
                await self._reply(message, data)
            for name, place in places.items():
                places[name] = min(place + LOG_BATCH, last)
                for seq in range(place + 1, places[name] + 1):
                    row = {"id": seq, "title": "t" * 200}
                    await self._send(
                        {"operation": "add", "topic": "movies", "subscription": name, "seq": seq, "data": row}
                    )
            if all(place == last for place in places.values()):
                await self._arrived.wait()
            else:
                await asyncio.sleep(0)  # lets the reader task run

    def _frame(self, frame: Mapping[str, Any], step: Step) -> Mapping[str, Any]:
        return {**frame, "subscription": self._name(step["to"])} if "to" in step else frame

    def _name(self, bound: str) -> str:
        """Return the name that the client gave its subscription, or a generated name."""
        message = dict(self._bound[bound])
        if "as" not in message:
            self._made_names += 1
            message["as"] = f"s{self._made_names}"
            self._bound[bound] = message
        return str(message["as"])

    async def _sent(self) -> None:
        """Wait until the kernel has received all written bytes, because an abort would discard the rest."""
        while self._socket.transport.get_write_buffer_size() > 0:  # noqa: ASYNC110 (the transport offers no event)
            await asyncio.sleep(0.001)


def refusal(status: int, headers: Mapping[str, str], detail: Any) -> Response:
    body = json.dumps({"detail": detail}).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close", **headers}
    return Response(status, HTTPStatus(status).phrase, Headers(fields), body)


def token_of(request: Request) -> str | None:
    """Return the token of the Authorization header or of the subprotocols `bearer, <token>`, if any."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token
    offered = [each.strip() for each in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
    return offered[1] if len(offered) == 2 and offered[0] == "bearer" else None
