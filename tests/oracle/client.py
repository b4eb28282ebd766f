"""The oracle's own websocket client: it applies frames to views, can be cut off and paused, and resumes on any worker.

It shares no code with the service or with the published clients. It sends messages without waiting for replies, so that
it can send even while it does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.oracle.views import Row, View, Wrong
from tests.support.frames_checked import check_frame

RECEIVE_BUFFER_BYTES = 16 * 1024  # a small buffer, so that the service soon notices a client that does not read
SEGMENT_BYTES = 1_400  # TCP itself would stall with the 64 KiB segments of the loopback interface
TOO_SLOW = 4008


@dataclass(eq=False)
class Watched:
    """A view and its subscription. Without `asks_name`, the service chooses the subscription's name."""

    view: View
    asks_name: str | None = None
    asks_snapshot: bool = True
    name: str | None = None  # the subscription's name while it is live
    is_asked: bool = False  # whether the reply to a subscribe or unsubscribe is pending
    comes_back: bool = False  # whether to subscribe again after the reply to unsubscribe
    is_bad: bool = False  # whether to send the next position with a wrong epoch


@dataclass(frozen=True)
class _Asked:
    action: str
    watched: Watched | None = None
    since: int | None = None
    snapshot: bool = False
    is_bad: bool = False
    answer: asyncio.Future[Row] | None = None


@dataclass(eq=False)
class Client:
    """A watcher. With `handshake`, a view of the default subscription, it never sends `subscribe`."""

    label: str
    urls: Sequence[str]
    problems: list[str]
    token: str | None = None
    user: int | None = None
    handshake: Watched | None = None
    watched: list[Watched] = field(default_factory=list)
    socket: ClientConnection | None = None
    frames: int = 0
    _epoch: str = ""
    _live: dict[str | None, Watched] = field(default_factory=dict)
    _asked: dict[int, _Asked] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _reading: asyncio.Event = field(default_factory=asyncio.Event)
    _reader: asyncio.Task[None] | None = None
    _is_explicit: bool = False

    @property
    def views(self) -> list[View]:
        return [each.view for each in ([self.handshake] if self.handshake else self.watched)]

    @property
    def is_open(self) -> bool:
        return self.socket is not None and self._reader is not None and not self._reader.done()

    @property
    def is_reading(self) -> bool:
        return self._reading.is_set()

    # --- connecting

    async def connect(self, worker: int) -> None:
        """Open a socket to a worker, and start a task that reads the welcome and all later frames."""
        await self.cut()
        query: dict[str, Any] = {}
        if self.handshake is not None:
            place = self.handshake.view.position
            assert place is not None
            query = {"topics": ",".join(self.handshake.view.topics), "since": place.seq, "epoch": place.epoch}
        headers = {"Authorization": f"Bearer {self.token}"} if self.token is not None else None
        url = self.urls[worker % len(self.urls)]
        self.socket = await connect(
            f"{url}?{urlencode(query)}",
            additional_headers=headers,
            max_size=None,
            max_queue=4,
            compression=None,
            proxy=None,
            ping_interval=None,
            close_timeout=1,
            sock=await _slim_socket(url),
        )
        self._is_explicit = False
        self._reading.set()
        self._reader = asyncio.create_task(self._read(self.socket), name=f"read-{self.label}")

    async def cut(self) -> None:
        """Disconnect without a close frame."""
        if self.socket is None:
            return
        closing, reader = self.socket, self._reader
        self.socket = self._reader = None
        closing.transport.abort()
        if reader is not None:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        with contextlib.suppress(ConnectionClosed, OSError):
            await closing.wait_closed()
        self._forget_questions()
        self._live.clear()
        for each in [*self.watched, *([self.handshake] if self.handshake else [])]:
            each.name, each.is_asked = None, False
            each.view.cut()

    def _forget_questions(self) -> None:
        for asked in self._asked.values():
            if asked.answer is not None and not asked.answer.done():
                asked.answer.set_exception(ConnectionError("the socket ended first"))
        self._asked.clear()

    def pause(self) -> None:
        self._reading.clear()

    def go_on(self) -> None:
        self._reading.set()

    # --- what it sends

    async def _say(self, asked: _Asked, **members: Any) -> None:
        if not self.is_open:
            return
        assert self.socket is not None
        id_ = next(self._ids)
        self._asked[id_] = asked
        message = {"id": id_, "action": asked.action, **members}
        # Ignore a broken socket: the reader task reports it.
        with contextlib.suppress(ConnectionClosed):
            await self.socket.send(orjson.dumps(message).decode())

    async def subscribe(self, watched: Watched) -> None:
        """Subscribe from the view's position, or with a snapshot if it has none; do nothing without an open socket."""
        if not self.is_open:
            return
        view = watched.view
        place = view.position
        members: dict[str, Any] = {"topics": list(view.topics)}
        if watched.asks_name is not None:
            members["as"] = watched.asks_name
        if view.wanted is not None:
            members["filter"] = {name: value for name, value in view.wanted.items() if name != "q"}
            members |= {name: value for name, value in view.wanted.items() if name == "q"}
        if view.latest_every_ms is not None:
            members["deliver"] = {"latest_every_ms": view.latest_every_ms}
        snapshot = watched.asks_snapshot or place is None
        if snapshot:
            members["snapshot"] = True
        is_bad = watched.is_bad and place is not None
        if place is not None:
            members |= {"since": place.seq, "epoch": "another" if is_bad else place.epoch}
        watched.is_asked, watched.is_bad = True, False
        since = place.seq if place is not None else None
        await self._say(_Asked("subscribe", watched, since, snapshot, is_bad), **members)

    async def unsubscribe(self, watched: Watched, *, comes_back: bool) -> None:
        """Unsubscribe. With `comes_back`, subscribe again from the view's position after the reply."""
        if not comes_back:
            self.watched.remove(watched)
        watched.comes_back = comes_back
        if self.is_open and watched.name is not None and not watched.is_asked:
            watched.is_asked = True
            await self._say(_Asked("unsubscribe", watched), subscription=watched.name)

    async def request(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Send a request; return the status and body of the reply. Raise ConnectionError if the socket ends first."""
        members = {"body": body} if body is not None else {}
        frame = await self._question("request", method=method, path=path, **members)
        return frame["status"], frame["body"]

    async def ping(self) -> None:
        """Wait for the reply to a ping. Raise ConnectionError if the socket ends first."""
        await self._question("ping")

    async def _question(self, action: str, **members: Any) -> Row:
        if not self.is_open:
            raise ConnectionError("closed")
        answer: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        await self._say(_Asked(action, answer=answer), **members)
        return await answer

    # --- what it receives

    async def _read(self, reading: ClientConnection) -> None:
        try:
            while True:
                await self._reading.wait()
                frame = orjson.loads(await reading.recv(decode=False))
                self.frames += 1
                asked = self._asked.get(frame.get("reply_to"))
                check_frame(frame, asked.action if asked is not None else None)
                await self._take(frame)
        except ConnectionClosed as error:
            if self.socket is reading and (error.rcvd is None or error.rcvd.code != TOO_SLOW):
                self.problems.append(f"{self.label} was closed: {error}")
        except (AssertionError, LookupError) as error:
            self.problems.append(f"{self.label}: {type(error).__name__}: {error}")
        finally:
            self._forget_questions()

    async def _take(self, frame: Row) -> None:
        if "reply_to" in frame:
            await self._take_reply(frame)
        elif frame["operation"] == "welcome":
            await self._welcome(frame["data"])
        else:
            watched = self._live.get(frame.get("subscription"))
            if watched is not None:
                await self._take_frame(watched, frame)
            elif self._is_explicit or "subscription" in frame:
                raise Wrong(f"a frame of an unknown subscription: {str(frame)[:300]}")

    async def _take_frame(self, watched: Watched, frame: Row) -> None:
        try:
            is_good = watched.view.take(frame, snapshot=watched.asks_snapshot)
        except Wrong as wrong:
            raise Wrong("\n  ".join([str(wrong), *watched.view.told])) from wrong
        if not is_good:
            watched.asks_snapshot = True
            await self.unsubscribe(watched, comes_back=True)

    async def _welcome(self, data: Mapping[str, Any]) -> None:
        self._epoch = data["epoch"]
        if self.handshake is not None:
            place = self.handshake.view.position
            assert place is not None
            self._live[None] = self.handshake
            self.handshake.view.subscribed(self._epoch, data["seq"], since=place.seq, snapshot=False)
        for each in list(self.watched):
            if each.name is None and not each.is_asked:
                await self.subscribe(each)

    async def _take_reply(self, frame: Row) -> None:
        asked = self._asked.pop(frame["reply_to"])
        if asked.answer is not None:
            if "status" not in frame and not frame["ok"]:
                raise Wrong(f"{asked} was rejected: {frame}")
            if not asked.answer.done():
                asked.answer.set_result(frame)
            return
        watched = asked.watched
        assert watched is not None
        if not frame["ok"]:
            raise Wrong(f"{asked.action} of {watched} was rejected: {frame['error']}")
        name = frame["data"]["subscription"]
        watched.is_asked = False
        if asked.action == "unsubscribe":
            del self._live[name]
            watched.name = None
            if watched.comes_back and watched in self.watched:
                await self.subscribe(watched)
            return
        if name in self._live or (watched.asks_name is not None and name != watched.asks_name):
            raise Wrong(f"unexpected subscription name {name}; live: {sorted(map(str, self._live))}")
        self._is_explicit = True
        self._live[name] = watched
        watched.name = name
        watched.view.subscribed(
            self._epoch, frame["data"]["seq"], since=asked.since, snapshot=asked.snapshot, is_bad=asked.is_bad
        )
        if watched not in self.watched:  # the view was given up before the reply to subscribe arrived
            self.watched.append(watched)
            await self.unsubscribe(watched, comes_back=False)


async def _slim_socket(url: str) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    found.setblocking(False)
    address = urlsplit(url)
    await asyncio.get_running_loop().sock_connect(found, (address.hostname, address.port))
    return found
