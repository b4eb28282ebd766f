"""A position without its epoch is rejected wherever it is sent, so that no client continues in another log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from repository.engine import event_log
from repository.engine.events import Head
from repository.engine.positions import Incomplete, parse_position, parse_written, position_of
from repository.engine.transaction import Transaction
from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import database_of
from tests.support.service import Service, Watcher
from tests.support.sockets import refusal, rows_of, subscribed

FORMS = {"together": "since=<epoch>:<seq>", "beside": "since=<seq>&epoch=<epoch>"}


def test_a_position_is_written_in_one_text_or_beside_its_epoch() -> None:
    assert position_of(parse_written("e:41"), None, **FORMS) == Head("e", 41)
    assert position_of(parse_written("41"), "e", **FORMS) == Head("e", 41)
    assert position_of(parse_written(41), "e", **FORMS) == Head("e", 41)
    assert position_of(None, None, **FORMS) is None
    for written, epoch, kind in (
        ("41", None, "missing_epoch"),
        ("e:41", "e", "repeated_epoch"),
        (None, "e", "missing_since"),
    ):
        with pytest.raises(Incomplete, match="since=<seq>&epoch=<epoch>") as caught:
            position_of(parse_written(written), epoch, **FORMS)
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    "value", [-1, 2**63, True, 1.5, "", "x", "-1", ":1", "e:", "e:-1", "e:1 ", "١", [], "9" * 20, "e:" + "9" * 20]
)
def test_anything_else_is_not_a_position(value: Any) -> None:
    assert parse_written(value) is None
    assert not isinstance(value, str) or parse_position(value) is None


async def restored(service: Service) -> None:
    """Remove the last three events from the log and renew its epoch, as a restored backup does."""

    async def cut(tx: Transaction) -> None:
        await tx.connection.execute(text("DELETE FROM events WHERE seq > (SELECT max(seq) - 3 FROM events)"))
        await tx.connection.execute(text("UPDATE event_head SET seq = seq - 3"))

    async with database_of(service) as database:
        await database.write(cut)
        await event_log.renew_epoch(database)


async def refused(watcher: Watcher, **members: Any) -> Any:
    reply = await watcher.ask({"id": 1, "action": "subscribe", "topics": ["movies"], **members})
    assert reply["error"]["code"] == "invalid_message"
    return reply["error"]["detail"]


async def test_no_entry_continues_in_the_log_of_a_restored_database(new_service: Callable[..., Service]) -> None:
    """The client's number also exists in the restored log, where it belongs to another event."""
    service = new_service().start()
    async with service.person() as alice, service.watch("topics=movies") as watcher:
        for _ in range(5):
            await alice.add()
            last = await watcher.expect("add")
    seq, epoch = last["seq"], watcher.welcome["data"]["epoch"]
    service.kill()
    await restored(service)
    service.start()
    async with service.person() as alice, service.anyone() as anonymous:
        movies = [await alice.add(title=f"another {number}") for number in range(6)]
        # A number without an epoch.
        for query in (f"?since={seq}", f"?since={seq}&topics=movies"):
            status, body = await refusal(service, query)
            assert (status, body["detail"][0]["type"]) == (422, "missing_epoch")
        for path in (f"/events?after={seq}", f"/events?after={seq}&topics=movies"):
            for accept in ("application/json", "text/event-stream"):
                answer = await anonymous.get(path, headers={"Accept": accept})
                assert (answer.status_code, answer.json()["detail"][0]["type"]) == (409, "missing_epoch")
        async with service.watch("topics=jobs") as watcher:
            for more in ({}, {"snapshot": True}, {"epoch": None}):
                [problem] = await refused(watcher, since=seq, **more)
                assert (problem["loc"], problem["type"]) == (["since"], "missing_epoch")
                assert '"since": "<epoch>:<seq>"' in problem["msg"]
        # A number with its epoch.
        for query in (f"since={epoch}:{seq}", f"since={seq}&epoch={epoch}"):
            async with service.watch(query) as watcher:
                assert (await watcher.next())["data"]["reason"] == "another epoch"
        for members in ({"since": f"{epoch}:{seq}"}, {"since": seq, "epoch": epoch}):
            async with service.watch() as watcher:
                await subscribed(watcher, topics=["movies"], **members)
                assert (await watcher.next())["data"]["reason"] == "another epoch"
                await subscribed(watcher, topics=["movies"], snapshot=True, filter={"user_id": alice.id}, **members)
                assert (await watcher.next())["data"]["reason"] == "another epoch"
                assert await rows_of(watcher) == movies
        for query in (f"after={epoch}:{seq}", f"after={seq}&epoch={epoch}", f"lastEventId={epoch}:{seq}"):
            page = (await anonymous.get(f"/events?{query}")).json()
            assert [frame["data"]["reason"] for frame in page["data"]] == ["another epoch"]


@SQLITE_ONLY
async def test_a_subscription_resumes_after_both_forms_of_a_position(service: Service) -> None:
    async with service.person() as alice, service.watch("topics=jobs") as watcher:
        start = watcher.welcome["data"]
        movie = await alice.add()
        for members in (
            {"since": f"{start['epoch']}:{start['seq']}"},
            {"since": start["seq"], "epoch": start["epoch"]},
        ):
            data = await subscribed(watcher, topics=["movies"], filter={"id": movie["id"]}, **members)
            assert data["seq"] == start["seq"]
            assert (await watcher.sees(movie))["subscription"] == data["subscription"]
