"""`uvicorn main:app` runs without our protocol class: websockets use plain ASGI, with the same guarantees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.service import Service
from tests.support.sockets import bulk_rows

pytestmark = SQLITE_ONLY


@pytest.fixture
def plain(new_service: Callable[..., Service]) -> Iterator[Service]:
    with new_service().under_uvicorn().running() as running:
        yield running


async def test_watchers_see_writes_and_resume(plain: Service) -> None:
    async with plain.person() as alice:
        async with plain.watch() as watcher:
            await watcher.sees(await alice.add())
            assert (await watcher.ask({"id": 1, "action": "ping"}))["ok"]
        await alice.generate("movies", 5_000)
        async with plain.watch(f"since={await plain.position(watcher.seqs[-1])}") as again:
            await again.until(lambda frame: frame.get("data", {}).get("state") == "done" and "seq" in frame)
            bulks = [event for event in again.events if event["operation"] == "add_bulk"]
            added = [event["data"]["count"] for event in bulks if event["topic"] == "movies"]
            assert sum(added) == 5_000
            assert again.seqs == list(range(watcher.seqs[-1] + 1, watcher.seqs[-1] + 1 + len(again.seqs)))


async def test_a_reader_that_stops_is_caught_up_later(plain: Service) -> None:
    async with plain.person() as alice, plain.watch("topics=movies", max_queue=1) as slow:
        await alice.generated("movies", 40_000)
        await bulk_rows(slow, 40_000)
        assert slow.seqs == sorted(set(slow.seqs))
