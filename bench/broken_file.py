"""Import a large CSV file with broken lines, once undisturbed, once cancelled and continued, and once with the service
killed, and check that every good line is stored once and every broken one reported.

python -m bench.broken_file [megabytes] [database URL]

Prints the rows per second and the memory of the service. A PostgreSQL database must be empty.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.service import Service, argument, client_of, running, signed_in

MEGABYTE = 1_000_000
LINES_PER_PROBLEM = 100
COLUMNS = b"title,description,rating,genres\r\n"
# Each broken line, and the beginning of the reason that is expected for it.
BROKEN = (
    (b'%d,text,ninety,"[]"', "Input should be a valid integer"),
    (b'%d,"text"quoted,90,[]', "Expected a comma after the closing quote"),
    (b"%d,\xff\xfe,90,[]", "Expected UTF-8"),
    (b"%d,too few cells", "Expected 4 cells, got 2"),
    (b'%d,text,90,"[""No such genre""]"', "There is no genre"),
    (b"%d,text,900,[]", "Input should be less than or equal to 100"),
)


@dataclass
class File:
    """A file, the titles of its good rows, and the reason for each broken line."""

    content: bytes = b""
    titles: set[str] = field(default_factory=set)
    reasons: dict[int, str] = field(default_factory=dict)


def made(size: int, name: str) -> File:
    chance = random.Random(name)
    words = [f"word{number}" for number in range(5_000)]
    file, lines, length, line = File(), [COLUMNS], 0, 1
    while length < size:
        line += 1
        if line % LINES_PER_PROBLEM == 0:
            broken, reason = BROKEN[chance.randrange(len(BROKEN))]
            lines.append(broken % line + b"\r\n")
            file.reasons[line] = reason
        else:
            title, text = f"{name} {line}", " ".join(chance.choices(words, k=20))
            breaks = line % 1_000 == 1  # a text with a line break, so the row has two lines
            lines.append(f'{title},"{text}{chr(10) if breaks else ""}",{line % 100 + 1},\r\n'.encode())
            file.titles.add(title)
            line += breaks
        length += len(lines[-1])
    file.content = b"".join(lines)
    return file


def memory(service: Service) -> tuple[int, int]:
    """Return the memory of the service now and at its peak, in MiB."""
    status = Path(f"/proc/{service.pid}/status").read_text()
    now, peak = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmRSS", "VmHWM"))
    assert now is not None
    assert peak is not None
    return int(now[1]) // 1024, int(peak[1]) // 1024


async def send(client: httpx.AsyncClient, content: bytes) -> str:
    headers = {"Content-Type": "text/csv"}
    answer = await client.post("/movies/import", content=content, headers=headers, timeout=600)
    answer.raise_for_status()
    return str(answer.json()["id"])


async def reached(client: httpx.AsyncClient, job: str, part: float) -> dict[str, object]:
    """Wait until this part of the lines is done, or the job has ended, and return the job."""
    while True:
        found: dict[str, object] = (await client.get(f"/jobs/{job}")).json()
        if found["state"] not in ("queued", "running") or int(str(found["done"])) >= part * int(str(found["total"])):
            return found
        await asyncio.sleep(0.05)


async def problems_of(client: httpx.AsyncClient, job: str) -> dict[int, str]:
    *problems, counts = [json.loads(line) for line in (await client.get(f"/jobs/{job}/report")).text.splitlines()]
    assert counts["not_shown"] == 0, counts
    return {each["line"]: each["reason"] for each in problems}


async def check(client: httpx.AsyncClient, name: str, file: File, reported: Mapping[int, str]) -> None:
    """Check that each good row is stored once, and each broken line has its reason."""
    unlike = []
    for line, reason in reported.items():
        if not reason.startswith(file.reasons.get(line, "?")):
            unlike.append((line, reason, file.reasons.get(line)))
    assert reported.keys() == file.reasons.keys(), (len(reported), len(file.reasons))
    assert not unlike, unlike[:5]
    export = f"/movies/export?format=csv&fields=title&title[prefix]={name}%20"
    _, *titles = (await client.get(export, timeout=600)).text.splitlines()
    assert sorted(titles) == sorted(file.titles), (len(titles), len(file.titles))


async def undisturbed(service: Service, size: int) -> None:
    file = made(size, "whole")
    async with signed_in(service) as client:
        started = time.monotonic()
        before = memory(service)
        job = await send(client, file.content)
        received, seconds = memory(service), time.monotonic() - started
        print(f"{len(file.content) / MEGABYTE:.0f} MB received in {seconds:.1f} s")
        started, found = time.monotonic(), []
        for part in (0.25, 0.5, 0.75, 1):
            ended = await reached(client, job, part)
            found.append(memory(service)[0])
        seconds = time.monotonic() - started
        assert ended["state"] == "done", ended
        print(f"imported: {len(file.titles) / seconds:,.0f} rows/s")
        print(
            f"memory in MiB: {before[0]} at first, {received[0]} with the file, {found} at each quarter of the import"
        )
        await check(client, "whole", file, await problems_of(client, job))
        print(f"{len(file.titles):,} good rows stored, {len(file.reasons):,} broken lines reported")


async def cancelled(service: Service, size: int) -> None:
    file = made(size, "cancelled")
    async with signed_in(service) as client:
        job = await send(client, file.content)
        await reached(client, job, 0.3)
        (await client.delete(f"/jobs/{job}")).raise_for_status()
        ended = await reached(client, job, 2)
        done = int(str(ended["done"]))
        assert ended["state"] == "cancelled", ended
        problems = await problems_of(client, job)
        rest = b"".join(file.content.splitlines(keepends=True)[done:])
        second = await send(client, COLUMNS + rest)
        assert (await reached(client, second, 1))["state"] == "done"
        problems |= {line + done - 1: reason for line, reason in (await problems_of(client, second)).items()}
        await check(client, "cancelled", file, problems)
        print(f"cancelled after {done:,} lines, and the rest sent: all rows stored once")


async def killed(url: str, size: int, kills: int = 3) -> None:
    file, job = made(size, "killed"), ""
    settings = {"RATE_LIMITS": "off", "DATABASE_URL": url, "SECRET_KEY": secrets.token_hex()}  # for tokens that last
    for turn in range(kills + 1):
        with running(settings=settings) as service:
            async with client_of(service) if job else signed_in(service) as client:
                if not job:
                    job = await send(client, file.content)
                    token = client.headers["Authorization"]
                client.headers["Authorization"] = token
                ended = await reached(client, job, (turn + 1) / (kills + 1))
                if turn < kills:
                    os.kill(service.pid, signal.SIGKILL)
                    continue
                assert ended["state"] == "done", ended
                await check(client, "killed", file, await problems_of(client, job))
    print(f"killed {kills} times: all rows stored once")


def main(size: int, url: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = url or f"sqlite:///{folder}/bench.db"
        with running(settings={"RATE_LIMITS": "off", "DATABASE_URL": url}) as service:
            asyncio.run(undisturbed(service, size))
            asyncio.run(cancelled(service, size))
        asyncio.run(killed(url, size))


if __name__ == "__main__":
    main(argument(1, 100) * MEGABYTE, sys.argv[2] if len(sys.argv) > 2 else None)
