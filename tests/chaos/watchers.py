"""The watchers of the chaos run: websockets that keep a position, resume, and remember every event they get.

They share no code with the service or its clients. The behaviour of a watcher follows from the seed of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from tests.chaos.judge import Frame, Wish
from tests.chaos.views import Marks, marked

DO_NOT_RECONNECT = range(4500, 5000)
SNAPSHOT = b'{"operation":"snapshot"'
SMALL_BUFFER_BYTES = 128 * 1024  # TCP itself would stall with a buffer smaller than one loopback segment


class Texts:
    """Parses each distinct frame once: most watchers receive the same frames. Snapshots and intervals are not kept."""

    def __init__(self) -> None:
        self._known: dict[bytes, Frame] = {}

    def parse(self, text: bytes, *, comes_once: bool) -> Frame:
        if comes_once or text.startswith(SNAPSHOT):
            once: Frame = json.loads(text)
            return once
        frame = self._known.get(text)
        if frame is None:
            frame = self._known[text] = json.loads(text)
        return frame


@dataclass(frozen=True)
class Manner:
    """The behaviour of a watcher. Numbers count frames or seconds; 0 means never."""

    kind: str
    leaves_after: int = 0  # disconnects after about this many frames, without a close frame
    stays_away: float = 0.0  # stays disconnected for up to this many seconds
    pauses_after: int = 0  # stops reading after about this many frames
    pauses_for: float = 0.0  # continues reading after up to this many seconds
    forgets: bool = False  # starts over after each reconnect, instead of resuming


@dataclass
class Segment:
    """A received stream: the events after sequence number `start`, and the snapshot before them, if there was one."""

    start: int
    items: Marks | None = None
    is_whole: bool = False  # whether the snapshot is complete
    got: list[Frame] = field(default_factory=list)


@dataclass
class Watcher:
    """A watcher. `segments` holds what it received: one segment if it always resumes, another for each new start."""

    wish: Wish
    manner: Manner
    urls: Sequence[str]
    chance: random.Random
    texts: Texts
    hurry: asyncio.Event  # once set, the watcher no longer pauses
    position: int = 0
    epoch: str = ""
    segments: list[Segment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    longest_silence: float = 0.0
    _unfinished: list[Frame] = field(default_factory=list)  # the frames of an incomplete event
    _heard_at: float = 0.0
    _is_new: bool = True

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                async with connect(
                    f"{self.chance.choice(self.urls)}?{self._query()}",
                    max_size=None,
                    max_queue=1 if self.manner.pauses_after else 16,
                    open_timeout=10,
                    close_timeout=0.5,
                    compression=None,
                    proxy=None,
                ) as websocket:
                    if self.manner.pauses_after:
                        raw = websocket.transport.get_extra_info("socket")
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
                    await self._watch(websocket)
                self.ends["left"] += 1
                await self._pause(self.manner.stays_away)
            except ConnectionClosed as error:
                code = error.rcvd.code if error.rcvd is not None else None
                self.ends[str(code or "cut")] += 1
                if code in DO_NOT_RECONNECT:
                    self.problems.append(f"closed with {code}")
            except (OSError, WebSocketException, TimeoutError):
                self.ends["refused"] += 1
            self._unfinished.clear()
            # A watcher that was cut in the middle of a snapshot has no position to resume from.
            self._is_new = not self.segments or self.manner.forgets or not self.segments[-1].is_whole
            await asyncio.sleep(self.chance.uniform(0.05, 0.4))

    def _query(self) -> str:
        query: dict[str, Any] = {}
        if self.wish.name is None:
            query = {"topics": ",".join(self.wish.topics), "bulk": self.wish.bulk}
            if not self._is_new:
                query |= {"since": self.position, "epoch": self.epoch}
        return urlencode(query)

    async def _watch(self, websocket: ClientConnection) -> None:
        """Receive frames until the watcher leaves; raise ConnectionClosed if the connection ends first."""
        frames = 0
        leave = self._about(self.manner.leaves_after)
        pause = self._about(self.manner.pauses_after)
        while True:
            frame = self.texts.parse(await websocket.recv(decode=False), comes_once=self.wish.latest_every_ms > 0)
            await self._take(frame, websocket)
            frames += 1
            if leave and frames >= leave:
                websocket.transport.abort()
                return
            if pause and frames % pause == 0:
                await self._pause(self.manner.pauses_for)

    async def _pause(self, up_to: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.chance.uniform(0, up_to)):
                await self.hurry.wait()

    def _about(self, number: int) -> int:
        return round(number * self.chance.uniform(0.5, 1.5)) if number else 0

    async def _take(self, frame: Frame, websocket: ClientConnection) -> None:
        operation = frame.get("operation")
        if operation == "welcome":
            await self._welcome(frame["data"], websocket)
        elif operation == "resync":
            self.problems.append(f"resync: {frame}")
        elif "reply_to" in frame:
            self._reply(frame)
        elif operation == "snapshot":
            self._page(frame)
        elif "seq" in frame and frame.get("subscription") == self.wish.name:
            self._unfinished.append(marked(frame) if self.wish.latest_every_ms else frame)
            if not frame.get("more"):
                self._finish(frame["seq"])

    def _finish(self, seq: int) -> None:
        if not self.segments or not self.segments[-1].is_whole:
            self.problems.append(f"event {seq} arrived before the stream began or the snapshot was complete")
            return
        self.segments[-1].got += self._unfinished
        self._unfinished.clear()
        self.position = seq
        now = time.monotonic()
        if self._heard_at:
            self.longest_silence = max(self.longest_silence, now - self._heard_at)
        self._heard_at = now

    async def _welcome(self, data: dict[str, Any], websocket: ClientConnection) -> None:
        if self.wish.name is None:
            self._begin(data["epoch"], data["seq"])
            return
        message: dict[str, Any] = {"id": 1, "action": "subscribe", "topics": self.wish.topics, "as": self.wish.name}
        if self.wish.filter is not None:
            message["filter"] = self.wish.filter
        if self.wish.bulk != "items":
            message["bulk"] = self.wish.bulk
        if self.wish.snapshot:
            message["snapshot"] = True
        if self.wish.latest_every_ms:
            message["deliver"] = {"latest_every_ms": self.wish.latest_every_ms}
        if self._is_new:
            self.epoch = data["epoch"]
        else:
            message |= {"since": self.position, "epoch": self.epoch}
        await websocket.send(json.dumps(message))

    def _reply(self, frame: Frame) -> None:
        if frame.get("ok") and frame["data"].get("subscription") == self.wish.name:
            self._begin(self.epoch, frame["data"]["seq"])
        elif frame.get("error", {}).get("code") == "unavailable":
            raise TimeoutError("the database is unavailable: the reply says to try again")
        else:
            self.problems.append(f"refused: {frame}")

    def _begin(self, epoch: str, seq: int) -> None:
        if self._is_new:
            self.segments.append(Segment(seq, Marks() if self.wish.snapshot else None, not self.wish.snapshot))
            self.position, self.epoch = seq, epoch
        elif (epoch, seq) != (self.epoch, self.position):
            self.problems.append(f"expected to resume at {self.epoch}:{self.position}, got {epoch}:{seq}")

    def _page(self, frame: Frame) -> None:
        segment = self.segments[-1] if self.segments else None
        if segment is None or segment.items is None or segment.is_whole or segment.got or frame["seq"] != segment.start:
            self.problems.append(f"unexpected snapshot page: {str(frame)[:300]}")
            return
        segment.items.extend(frame["data"]["items"])
        segment.is_whole = frame["data"]["done"]
