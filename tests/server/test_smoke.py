"""The first thing a user does."""

from __future__ import annotations

from tests.support.service import Service


async def test_a_watcher_sees_what_a_person_adds(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        movie = await alice.add(title="The Third Man")
        event = await watcher.expect("add", "movies")
        assert event["data"] == movie
        assert event["seq"] == watcher.welcome["data"]["seq"] + 1
        assert event["actor_id"] == alice.id
