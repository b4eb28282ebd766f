"""Thousands of watchers in one lightweight process: `python -m tests.chaos.storm_client <watchers> <port>…`.

A client library would use more CPU than the service, so this process speaks just enough of RFC 6455 itself. It reads
commands from standard input, one JSON object per line, and writes each result as one line to standard output:

    {"do": "connect"}                  all connect -> {"seconds": …, "refused": …}
    {"do": "cut", "away_seconds": 1}   all are cut, and reconnect together -> {"seconds": until all have caught up, …}
    {"do": "judge", "seqs": [...]}     compare with the events of the log -> {"wrong": [...], "events": …}
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import uvloop

from tests.support.service import eventually

HOST = "127.0.0.1"
RETRY_SECONDS = 0.2
GRACE_SECONDS = 0.5  # a watcher has caught up when it is less than this far behind the uncut watchers
DEADLINE_SECONDS = 60.0
REQUEST = (
    "GET /ws{query} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
WELCOME = b'{"operation":"welcome"'
RESYNC = b'{"operation":"resync"'
TEXT, CLOSE, PING = 1, 8, 9


class Watcher:
    """A watcher: `start` is where its stream began, `seqs` are all events since then, over all its connections."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.start: int | None = None
        self.epoch = ""
        self.seqs: list[int] = []
        self.problems: list[str] = []
        self.refused = 0
        self.wire: Wire | None = None
        self.is_away = False

    @property
    def position(self) -> int:
        return self.seqs[-1] if self.seqs else self.start or 0

    async def connect(self) -> None:
        while True:
            try:
                await asyncio.get_running_loop().create_connection(lambda: Wire(self), HOST, self.port)
                return
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)

    def welcomed(self, epoch: str, seq: int) -> None:
        if self.start is None:
            self.start, self.epoch = seq, epoch
        elif (epoch, seq) != (self.epoch, self.position):
            self.problems.append(f"expected to resume at {self.epoch}:{self.position}, got {epoch}:{seq}")

    def lost(self) -> None:
        self.wire = None
        if not self.is_away:
            self.refused += 1
            asyncio.get_running_loop().call_later(RETRY_SECONDS, lambda: asyncio.ensure_future(self.connect()))


class Wire(asyncio.Protocol):
    """One connection."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.transport: Any = None
        self._rest = b""
        self._is_open = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.watcher.wire = self
        watcher = self.watcher
        query = f"?since={watcher.position}&epoch={watcher.epoch}" if watcher.start is not None else ""
        transport.write(REQUEST.format(query=query).encode())

    def connection_lost(self, error: Exception | None) -> None:
        if self.watcher.wire is self:
            self.watcher.lost()

    def cut(self) -> None:
        self.watcher.wire = None
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.watcher.wire is not self:
            return
        data = self._rest + data if self._rest else data
        position = 0
        if not self._is_open:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._rest = data
                return
            if not data.startswith(b"HTTP/1.1 101"):
                self.transport.abort()
                return
            self._is_open, position = True, end + 4
        size = len(data)
        while size - position >= 2:
            length, start = data[position + 1] & 0x7F, position + 2
            if length == 126:
                length, start = int.from_bytes(data[start : start + 2], "big"), start + 2
            elif length == 127:
                length, start = int.from_bytes(data[start : start + 8], "big"), start + 8
            if start + length > size:
                break
            self._frame(data[position] & 0x0F, data, start, start + length)
            position = start + length
        self._rest = data[position:]

    def _frame(self, opcode: int, data: bytes, start: int, end: int) -> None:
        if opcode == TEXT:
            if data.startswith(WELCOME, start):
                welcome = json.loads(data[start:end])["data"]
                self.watcher.welcomed(welcome["epoch"], welcome["seq"])
            elif data.startswith(RESYNC, start):
                self.watcher.problems.append(data[start:end].decode())
            else:
                found = data.find(b'"seq":', start, min(end, start + 200))
                if found >= 0:
                    self.watcher.seqs.append(int(data[found + 6 : data.index(b",", found)]))
        elif opcode == PING:
            payload = data[start:end]
            self.transport.write(bytes((0x8A, 0x80 | len(payload))) + b"\0\0\0\0" + payload)
        elif opcode == CLOSE:
            self.transport.close()


class Crowd:
    """The watchers, and one per port whose connection is never cut; its position shows how far the others should be."""

    def __init__(self, number: int, ports: Sequence[int]) -> None:
        self.uncut = [Watcher(port) for port in ports]
        self.watchers = [Watcher(ports[index % len(ports)]) for index in range(number)]

    async def connect(self) -> dict[str, Any]:
        began = time.monotonic()
        await asyncio.gather(*(watcher.connect() for watcher in (*self.uncut, *self.watchers)))
        await self._until(lambda: all(each.start is not None for each in self.watchers))
        return {"seconds": time.monotonic() - began, "refused": sum(each.refused for each in self.watchers)}

    async def cut(self, away_seconds: float) -> dict[str, Any]:
        for watcher in self.watchers:
            watcher.is_away, watcher.refused = True, 0
            if watcher.wire is not None:
                watcher.wire.cut()
        await asyncio.sleep(away_seconds)
        missed = max(each.position for each in self.uncut) - min(each.position for each in self.watchers)
        began = time.monotonic()
        coming = [asyncio.ensure_future(self._come_back(watcher)) for watcher in self.watchers]
        past: list[tuple[float, int]] = []

        def caught_up() -> bool:
            now = time.monotonic()
            past.append((now, max(each.position for each in self.uncut)))
            while len(past) > 1 and past[1][0] <= now - GRACE_SECONDS:
                past.pop(0)
            return all(each.wire is not None and each.position >= past[0][1] for each in self.watchers)

        await self._until(caught_up)
        seconds = time.monotonic() - began
        await asyncio.gather(*coming)
        return {"seconds": seconds, "missed": missed, "refused": sum(each.refused for each in self.watchers)}

    async def _come_back(self, watcher: Watcher) -> None:
        watcher.is_away = False
        await watcher.connect()

    async def judge(self, seqs: Sequence[int]) -> dict[str, Any]:
        await self._until(lambda: all(each.position >= seqs[-1] for each in (*self.uncut, *self.watchers)))
        await asyncio.sleep(GRACE_SECONDS)
        wrong = []
        for index, watcher in enumerate((*self.uncut, *self.watchers)):
            expected = seqs[bisect.bisect_right(seqs, watcher.start or 0) :]
            if watcher.problems or watcher.seqs != expected:
                different = sorted(set(expected) ^ set(watcher.seqs))[:5]
                wrong.append(
                    f"watcher {index}: {watcher.problems}, after {watcher.start} expected {len(expected)} "
                    f"events, got {len(watcher.seqs)}; differing numbers {different}"
                )
        return {"wrong": wrong, "events": sum(len(each.seqs) for each in self.watchers)}

    async def _until(self, check: Any) -> None:
        with contextlib.suppress(AssertionError):  # a timeout is no error here: the result shows what is missing
            await eventually(check, "all watchers are there", DEADLINE_SECONDS)


async def main(number: int, ports: Sequence[int]) -> None:
    crowd = Crowd(number, ports)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        work = getattr(crowd, command.pop("do"))
        print(json.dumps(await work(**command)), flush=True)


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
