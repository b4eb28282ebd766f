"""A small HTTP/1.1 client for the oracle, which sends thousands of small requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

IDLE_SECONDS = 2.0  # the server closes connections that are idle for 5 s


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # header names in lower case
    body: Any  # None if the response has no body


@dataclass
class Rest:
    """One worker's REST API."""

    port: int
    _idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        content = orjson.dumps(body) if body is not None else b""
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(content)}"]
        if content:
            lines.append("Content-Type: application/json")
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        reader, writer = await self._connection()
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + content)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
            fields = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
            }
            found = await reader.readexactly(int(fields.get("content-length", 0)))
        except BaseException:
            writer.transport.abort()  # otherwise, the next request might get a late response to this request
            raise
        self._idle.append((time.monotonic(), reader, writer))
        return Answer(int(head[0].split()[1]), fields, orjson.loads(found) if found else None)

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            since, reader, writer = self._idle.pop()
            if time.monotonic() - since < IDLE_SECONDS:
                return reader, writer
            await _close(writer)
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)

    async def close(self) -> None:
        for _, _, writer in self._idle:
            await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
