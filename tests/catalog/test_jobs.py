"""Background generation: rows are stored once even if processes are killed; jobs have a rate, a seed and progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from core.errors import TooManyRequests, Unauthenticated
from core.filters import EVERYTHING
from core.identity import Group, Identity
from jobs import generation
from jobs.cleanup import Cleanup, Retention
from repository import jobs
from repository.engine.database import Database
from repository.jobs import JobOrder
from tests.conftest import Places
from tests.support.accounts import account, delete, outcome
from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import database_of
from tests.support.requests import assert_problem, values_by_field
from tests.support.resources import sql, watching
from tests.support.service import Person, Service, Watcher, eventually


def rows_of(event: dict[str, Any]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = event["data"]["items"]
    assert event["data"]["count"] == len(items)
    return items


async def read_rows(watcher: Watcher, total: int, topic: str = "movies", seconds: float = 120.0) -> list[int]:
    """Read `add_bulk` events on a topic until they contain `total` rows, and return the ids of the rows."""
    ids: list[int] = []
    async with asyncio.timeout(seconds):
        while len(ids) < total:
            frame = await watcher.next(seconds)
            if frame.get("operation") == "add_bulk" and frame["topic"] == topic:
                ids += [row["id"] for row in rows_of(frame)]
    return ids


@pytest.mark.parametrize("resource", ["movies", "characters"])
async def test_generated_rows_stream_in_and_are_stored(service: Service, resource: str) -> None:
    async with service.person() as alice, service.watch() as watcher:
        answer = await alice.http.post(f"/{resource}/generate/2500?seed=7")
        assert answer.status_code == 202
        job = answer.json()
        assert answer.headers["Location"] == f"/jobs/{job['id']}"
        counts, times = {"done", "total", "rows_per_second"}, {"created_at", "started_at", "finished_at"}
        assert set(job) == {"id", "kind", "state", "seed", "user_id", "error"} | counts | times
        assert (job["kind"], job["state"], job["done"], job["total"]) == (f"generate_{resource}", "queued", 0, 2500)
        assert (job["seed"], job["user_id"]) == (7, alice.id)
        assert (await watcher.expect("add", "jobs"))["data"] == job
        running = await watcher.expect("update", "jobs")
        assert (running["data"]["state"], running["changed"]) == ("running", ["state", "started_at"])
        ids = await read_rows(watcher, 2500, resource)
        done = await watcher.until(lambda frame: frame["operation"] == "update" and frame["topic"] == "jobs")
        # The rate may be the same as before.
        assert set(done["changed"]) | {"rows_per_second"} == {"state", "done", "rows_per_second", "finished_at"}
        assert (done["data"]["state"], done["data"]["done"]) == ("done", 2500)
        assert done["data"] == (await alice.http.get(f"/jobs/{job['id']}")).json()
        assert watcher.seqs == list(range(watcher.seqs[0], watcher.seqs[0] + len(watcher.seqs)))
        assert len(set(ids)) == 2500
        mine = await alice.http.get(f"/{resource}/user?limit=1000&after={ids[0] - 1}")
        assert [row["id"] for row in mine.json()] == ids[:1000]
        assert mine.headers["X-Total-Count"] == "2500"
        added = [event for event in watcher.events if event["operation"] == "add_bulk"]
        assert {event["data"]["job_id"] for event in added} == {job["id"]}
        first = next(event for event in added if event["topic"] == resource)
        assert (await alice.http.get(f"/{resource}/{ids[0]}")).json()["id"] == rows_of(first)[0]["id"]


async def test_events_hold_generated_rows_as_a_reader_gets_them(service: Service) -> None:
    async with service.person() as alice, service.watch("topics=movies") as watcher:
        await alice.generate("movies", 3)
        for row in rows_of(await watcher.expect("add_bulk")):
            assert (await alice.http.get(f"/movies/{row['id']}")).json() == row


async def test_generated_characters_belong_to_existing_movies(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await alice.http.post("/movies/bulk", json=[{"title": f"m{n}"} for n in range(30)])
        job = await alice.generate("characters", 200)
        await alice.job_ended(job["id"])
        await watcher.until(lambda frame: frame.get("data", {}).get("state") == "done" and "seq" in frame)
        added = next(e for e in watcher.events if (e["topic"], e["operation"]) == ("characters", "add_bulk"))
        counted = next(e for e in watcher.events if (e["topic"], e["operation"]) == ("movies", "update_bulk"))
        assert counted["changed"] == ["characters_count"]
        assert {row["movie_id"] for row in rows_of(added)} == {movie["id"] for movie in rows_of(counted)}
        for movie in rows_of(counted)[:3]:
            assert (await alice.http.get(f"/movies/{movie['id']}")).json() == movie


def without_identity(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("id", "user_id", "created_at", "updated_at")}


async def test_a_seed_repeats_the_rows_with_any_batch_size(service: Service) -> None:
    async with service.person() as alice:
        made = []
        for query in ("?seed=42", "?seed=42&batch_size=77", "?seed=43"):
            async with service.watch("topics=movies") as watcher:
                await alice.generate("movies", 250, query)
                rows: list[dict[str, Any]] = []
                while len(rows) < 250:
                    rows += rows_of(await watcher.expect("add_bulk"))
                made.append([without_identity(row) for row in rows])
        assert made[0] == made[1]
        assert made[0] != made[2]


def test_any_slice_of_the_rows_can_be_generated_alone() -> None:
    whole = generation.rows("generate_movies", 5, 0, 350)
    assert generation.rows("generate_movies", 5, 95, 210) == whole[95:305]
    assert generation.rows("generate_movies", 5, 349, 1) == whole[349:]
    assert len({row["title"] for row in whole}) > 250


async def test_a_rate_paces_the_rows(service: Service) -> None:
    async with service.person() as alice, service.watch("topics=movies") as watcher:
        started = time.monotonic()
        job = await alice.generate("movies", 60, "?rate=30")
        counts: list[int] = []
        while sum(counts) < 60:
            counts.append((await watcher.expect("add_bulk"))["data"]["count"])
        assert 1.8 <= time.monotonic() - started < 6
        assert len(counts) == 10, "expected five chunks a second"
        assert 20 <= (await alice.job_ended(job["id"]))["rows_per_second"] <= 31


async def test_progress_is_sent_at_most_five_times_a_second_until_the_end(service: Service) -> None:
    async with service.person() as alice, service.watch("topics=jobs") as watcher:
        job = await alice.generate("movies", 150, "?batch_size=1&rate=50")
        frames: list[tuple[float, dict[str, Any]]] = []
        while not frames or frames[-1][1]["state"] != "done":
            frame = await watcher.next()
            if frame["operation"] == "progress":
                assert set(frame) == {"operation", "topic", "data"}
                assert set(frame["data"]) == {"id", "state", "done", "total", "rows_per_second"}
                assert frame["data"]["id"] == job["id"]
                frames.append((time.monotonic(), frame["data"]))
        done = [data["done"] for _, data in frames]
        assert done == sorted(done)
        assert done[-1] == 150
        elapsed = frames[-1][0] - frames[0][0]
        assert 5 < len(frames) <= elapsed * 5 + 2


async def count(person: Person, resource: str = "movies") -> int:
    answer = await person.http.get(f"/{resource}/user?limit=0")
    return int(answer.headers["X-Total-Count"])


@pytest.mark.parametrize(("total", "query"), [(1_000_000, ""), (100_000, "?rate=2"), (500, "?rate=0.01")])
async def test_cancelling_takes_effect_at_once(service: Service, total: int, query: str) -> None:
    async with service.person() as alice, service.watch() as watcher:
        job = await alice.generate("movies", total, query)
        await watcher.until(lambda frame: frame.get("data", {}).get("state") == "running")
        answer = await alice.http.delete(f"/jobs/{job['id']}")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert answer.json()["finished_at"] is not None
        stored = await count(alice)
        assert answer.json()["done"] == stored
        last = await watcher.until(lambda frame: frame.get("data", {}).get("state") == "cancelled" and "seq" in frame)
        marker = await alice.add(title="after the cancel")
        after = await watcher.expect("add", "movies")
        assert after["data"] == marker
        assert after["seq"] == last["seq"] + 1, "no event follows the cancellation"
        assert await count(alice) == stored + 1
        again = await alice.http.delete(f"/jobs/{job['id']}")
        assert (again.status_code, again.json()) == (200, answer.json())


async def test_finished_and_unknown_jobs_are_not_cancelled(service: Service) -> None:
    async with service.person() as alice:
        finished = await alice.generate("movies", 1)
        await alice.job_ended(finished["id"])
        unknown = "/jobs/00000000-0000-0000-0000-000000000000"
        for method, path, status in (
            ("DELETE", f"/jobs/{finished['id']}", 409),
            ("DELETE", unknown, 404),
            ("GET", unknown, 404),
            ("GET", "/jobs/7", 422),
        ):
            assert_problem(await alice.http.request(method, path), status)


@SQLITE_ONLY
async def test_invalid_parameters_of_a_job_are_rejected(service: Service) -> None:
    async with service.person() as alice:
        for number in ("0", "1000001", "many"):
            assert_problem(await alice.http.post(f"/movies/generate/{number}"), 422, ["path", "number"])
        invalid = {"rate": ["0", "nan", "inf"], "batch_size": ["0", "10001"], "seed": ["-1", "x"], "speed": ["9"]}
        for field, value in values_by_field(invalid):
            assert_problem(await alice.http.post(f"/movies/generate/10?{field}={value}"), 422, ["query", field])


async def test_a_user_has_a_bounded_number_of_unfinished_jobs(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on").start()
    async with service.person() as alice, service.person() as bob:
        ordered = [await alice.generate("movies", 1000, "?rate=1") for _ in range(jobs.MAX_UNFINISHED_PER_USER)]
        refused = await alice.http.post("/movies/generate/1")
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        listed = await bob.http.get(f"/jobs?state[in]=queued,running&user_id={alice.id}&limit=2")
        assert len(listed.json()) == 2
        assert int(listed.headers["X-Total-Count"]) == jobs.MAX_UNFINISHED_PER_USER
        for job in ordered:
            assert (await alice.http.delete(f"/jobs/{job['id']}")).status_code == 200
        finished = await bob.generate("movies", 1)
        await bob.job_ended(finished["id"])


async def test_without_limits_unfinished_jobs_are_unlimited(service: Service) -> None:
    async with service.person() as alice:
        ordered = [await alice.generate("movies", 1000, "?rate=1") for _ in range(jobs.MAX_UNFINISHED_PER_USER + 1)]
        for job in ordered:
            assert (await alice.http.delete(f"/jobs/{job['id']}")).status_code == 200


async def test_concurrent_orders_do_not_exceed_the_bound(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on").start()
    async with service.person() as alice:
        orders = [alice.http.post("/movies/generate/1000?rate=1") for _ in range(2 * jobs.MAX_UNFINISHED_PER_USER)]
        answers = await asyncio.gather(*orders)
        accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
        assert len(accepted) == jobs.MAX_UNFINISHED_PER_USER
        assert {answer.status_code for answer in answers} == {202, 429}
        for job_id in accepted:
            await alice.http.delete(f"/jobs/{job_id}")


async def order(
    database: Database,
    user_id: int,
    quota: int | None = None,
    rate: float | None = None,
    origin: jobs.Origin | None = None,
) -> dict[str, Any]:
    wanted = JobOrder("generate_movies", total=10, seed=1, batch_size=10, rate=rate)
    identity = Identity(user_id, Group.USER, time.time() + 60, "a session", None)
    return await database.write(lambda tx: jobs.create(tx, identity, wanted, quota, origin))


async def test_an_order_beside_the_deletion_of_its_user_leaves_no_job(database: Database) -> None:
    for number in range(10):
        user_id = await account(database, f"user{number}")
        pair = [outcome(order(database, user_id)), delete(database, user_id)]
        await asyncio.gather(*(pair if number % 2 else reversed(pair)))
    # A job requested before the deletion was cancelled, and a later request was rejected.
    assert await jobs.claim(database, "a worker") is None


async def test_an_order_of_a_deleted_user_is_refused(database: Database) -> None:
    user_id = await account(database, "alice")
    await delete(database, user_id)
    assert await outcome(order(database, user_id)) is Unauthenticated
    assert (await jobs.newest(database, EVERYTHING, offset=0, limit=10)).total == 0


async def test_a_killed_server_finishes_its_job_without_gaps_or_duplicates(new_service: Callable[..., Service]) -> None:
    total = 60_000
    service = new_service().start()
    ids: list[int] = []
    seqs: list[int] = []
    async with service.person() as alice:
        async with watching(service) as watcher:
            epoch = watcher.welcome["data"]["epoch"]
            seqs.append(watcher.welcome["data"]["seq"])
            job = await alice.generate("movies", total)
            await _read_until(watcher, ids, seqs, total // 6)
            await asyncio.to_thread(service.kill)
        for until in (total // 3, total):
            await asyncio.to_thread(service.kill)
            await sql(service, "UPDATE jobs SET lease_until = 0")  # let the lease of the killed process expire
            await asyncio.to_thread(service.start)
            async with service.watch(f"since={seqs[-1]}&epoch={epoch}") as watcher:
                await _read_until(watcher, ids, seqs, until)
        ended = await alice.job_ended(job["id"])
        assert (ended["state"], ended["done"]) == ("done", total)
        assert await count(alice) == total
    assert len(ids) == len(set(ids)) == total
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


async def _read_until(watcher: Watcher, ids: list[int], seqs: list[int], total: int) -> None:
    while len(ids) < total:
        frame = await watcher.next(60)
        assert frame["operation"] != "resync"
        if "seq" in frame:
            seqs.append(frame["seq"])
        if frame.get("operation") == "add_bulk" and frame["topic"] == "movies":
            ids += [row["id"] for row in rows_of(frame)]


async def test_another_worker_takes_over_from_a_killed_one(
    new_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = new_places()
    first, second = new_service(places).start(), new_service(places).start()
    async with first.person() as alice, second.watch("topics=movies") as watcher:
        job = await alice.generate("movies", 15_000, "?rate=10000")
        ids = await read_rows(watcher, 3_000)
        await asyncio.to_thread(first.kill)
        ids += await read_rows(watcher, 15_000 - len(ids))
        assert len(set(ids)) == len(ids) == 15_000
        async with second.anyone() as client:

            async def is_done() -> bool:
                return bool((await client.get(f"/jobs/{job['id']}")).json()["state"] == "done")

            await eventually(is_done, "the job is done")


async def test_a_stopped_server_hands_its_job_over_at_once(
    new_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = new_places()
    service = new_service(places).start()
    async with service.person() as alice, service.watch("topics=movies") as watcher:
        await alice.generate("movies", 2_000, "?rate=1000")
        await read_rows(watcher, 500)
        assert await asyncio.to_thread(service.stop) == 0
    service.start()
    started = time.monotonic()
    async with service.watch(f"since={await service.position(0)}&topics=movies") as watcher:
        ids = await read_rows(watcher, 2_000)
        assert len(set(ids)) == len(ids) == 2_000
    assert time.monotonic() - started < jobs.LEASE_SECONDS + 1.5, "the job did not wait for its lease to end"


# --- users take turns


async def test_users_take_turns(database: Database) -> None:
    alice, bob, carol = [await account(database, name) for name in ("alice", "bob", "carol")]
    mine = [(await order(database, alice))["id"] for _ in range(3)]
    his, hers = (await order(database, bob))["id"], (await order(database, carol))["id"]

    async def turn() -> str:
        claimed = await jobs.claim(database, "a worker")
        assert claimed is not None
        assert await jobs.others_wait(database, claimed.user_id)
        await jobs.release(database, claimed.id, "a worker")
        await asyncio.sleep(0.002)  # SQLite's clock counts milliseconds, and the order needs different times
        return claimed.id

    assert [await turn() for _ in range(6)] == [mine[0], his, hers] * 2
    # While one of a user's jobs runs, the user's other jobs come last.
    running = await jobs.claim(database, "a worker")
    assert running is not None
    assert [running.id, *[await turn() for _ in range(4)]] == [mine[0], his, hers, his, hers]


async def test_a_job_that_waits_for_its_pace_is_claimed_when_it_is_due(database: Database) -> None:
    alice = await account(database, "alice")
    await order(database, alice, rate=1.0)
    first = await jobs.claim(database, "a worker")
    assert first is not None
    assert first.wait_seconds is None
    await jobs.release(database, first.id, "a worker", wait_seconds=2.0)
    assert await jobs.claim(database, "a worker") is None
    assert not await jobs.others_wait(database, alice + 1)

    async def claimed() -> jobs.ClaimedJob | None:
        return await jobs.claim(database, "a worker")

    second = await eventually(claimed, "the job is due")
    assert second.id == first.id
    assert -5 < second.wait_seconds <= 0


async def test_a_pause_longer_than_a_lease_is_kept(database: Database) -> None:
    alice = await account(database, "alice")
    await order(database, alice, rate=0.1)  # the ten rows of a chunk take 100 seconds
    claimed = await jobs.claim(database, "a worker")
    assert claimed is not None
    await jobs.release(database, claimed.id, "a worker", wait_seconds=jobs.LEASE_SECONDS * 10)
    assert await jobs.claim(database, "another worker") is None


async def test_paced_jobs_do_not_occupy_a_slot_while_they_wait(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        paced = [await alice.generate("movies", 10, "?rate=0.01") for _ in range(6)]
        await bob.job_ended((await bob.generate("movies", 10))["id"])
        for job in paced:
            found = (await bob.http.get(f"/jobs/{job['id']}")).json()
            assert (found["done"], found["state"] in ("queued", "running")) == (0, True)
            assert (await alice.http.delete(f"/jobs/{job['id']}")).status_code == 200


async def test_a_user_with_long_jobs_makes_room_for_another(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        long = [await alice.generate("movies", 1_000_000, "?batch_size=50") for _ in range(4)]
        await bob.job_ended((await bob.generate("movies", 10))["id"])
        for job in long:
            cancelled = (await alice.http.delete(f"/jobs/{job['id']}")).json()
            assert (cancelled["state"], cancelled["done"] < 1_000_000) == ("cancelled", True)


async def test_a_killed_server_continues_a_paced_job_exactly(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice:
        start = await service.position(0)
        job = await alice.generate(
            "movies", 12, "?rate=1.5&batch_size=2"
        )  # the job stores a chunk every 1.3 s and waits in between
        async with service.watch("topics=movies") as watcher:
            await read_rows(watcher, 4)
        service.kill()
        service.start()
        assert (await alice.job_ended(job["id"]))["done"] == 12
        assert await count(alice) == 12
        async with service.watch(f"since={start}&topics=movies") as watcher:
            ids = await read_rows(watcher, 12)
            assert len(set(ids)) == len(ids) == 12


# --- quotas, clean-up and cancellation


@SQLITE_ONLY
async def test_a_rate_that_takes_more_than_a_day_is_refused(service: Service) -> None:
    async with service.person() as alice:
        refused = await alice.http.post("/movies/generate/86401?rate=1")
        assert_problem(refused, 422, ["query", "rate"])
        assert "at least 1.01 rows per second to store 86401 rows within a day" in refused.json()["detail"][0]["msg"]
        accepted = await alice.generate("movies", 86_400, "?rate=1")
        assert (await alice.http.delete(f"/jobs/{accepted['id']}")).status_code == 200


async def test_a_user_has_a_quota_of_rows(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on", GENERATED_ROWS_PER_DAY="1000").start()
    async with service.person() as alice, service.person() as bob:
        for path in ("/movies/generate/1001", "/movies/generate/200?with=characters,comments"):
            assert_problem(await alice.http.post(path), 422, ["path", "number"])
        cancelled = await alice.generate("movies", 1_000, "?rate=1&batch_size=1000")
        refused = await alice.http.post("/characters/generate/1")
        assert refused.status_code == 429
        assert 86_000 < int(refused.headers["Retry-After"]) <= 86_400
        assert "at most 1000 generated and imported rows" in refused.json()["detail"]
        assert (await alice.http.delete(f"/jobs/{cancelled['id']}")).status_code == 200
        await alice.generated("movies", 600)
        assert (await alice.http.post("/movies/generate/401")).status_code == 429
        await alice.generated("characters", 400)
        assert (await alice.http.post("/movies/generate/1")).status_code == 429
        await bob.generated("movies", 1)
        await sql(service, "UPDATE jobs SET created_at = '2020-01-01T00:00:00.000000Z'")
        await alice.generated("movies", 1)


async def test_the_users_of_one_network_share_a_multiple_of_the_quota(new_service: Callable[..., Service]) -> None:
    settings = {"TRUSTED_PROXIES": "127.0.0.1", "USERS_PER_ADDRESS": "2"}
    service = new_service(RATE_LIMITS="on", GENERATED_ROWS_PER_DAY="100", **settings).start()
    async with AsyncExitStack() as stack:
        people = [
            await stack.enter_async_context(service.person(headers={"X-Forwarded-For": f"2001:db8:0:1::{number}"}))
            for number in range(1, 4)
        ]
        for person in people[:2]:
            await person.generated("movies", 100)
        refused = await people[2].http.post("/movies/generate/1")
        assert refused.status_code == 429
        assert 86_000 < int(refused.headers["Retry-After"]) <= 86_400
        whose = "the users of 2001:db8:0:1::/64 have already requested 200"
        expected = f"at most 200 generated and imported rows in 24 hours; {whose}"
        assert expected in refused.json()["detail"]
        elsewhere = {"X-Forwarded-For": "192.0.2.1"}
        assert (await people[2].http.post("/movies/generate/1", headers=elsewhere)).status_code == 202


async def test_concurrent_orders_of_one_network_do_not_exceed_its_multiple(database: Database) -> None:
    users = [await account(database, f"user{number}") for number in range(4)]
    origin = jobs.Origin("192.0.2.0", 2)
    found = await asyncio.gather(*(outcome(order(database, user_id, 10, origin=origin)) for user_id in users))
    assert found.count(TooManyRequests) == 2
    stored = await jobs.newest(database, EVERYTHING, offset=0, limit=10)
    assert stored.total == 2


async def test_the_users_of_one_network_share_a_multiple_of_unfinished_jobs(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_UNFINISHED_PER_USER", 1)
    origin, other = jobs.Origin("192.0.2.0", 2), jobs.Origin("192.0.2.1", 2)
    users = [await account(database, f"user{number}") for number in range(3)]
    for user_id in users[:2]:
        await order(database, user_id, origin=origin)
    assert await outcome(order(database, users[2], origin=origin)) is TooManyRequests
    await order(database, users[2], origin=other)


async def test_without_limits_there_is_no_quota(new_service: Callable[..., Service]) -> None:
    service = new_service(GENERATED_ROWS_PER_DAY="10").start()
    async with service.person() as alice:
        await alice.generated("movies", 20)


async def test_finished_jobs_are_deleted_with_an_event(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice:
        old, new = [await alice.generated("movies", 1) for _ in range(2)]
        waiting = await alice.generate("movies", 10, "?rate=0.01")
        long_ago = "2020-01-01T00:00:00.000000Z"
        await sql(service, f"UPDATE jobs SET finished_at = '{long_ago}' WHERE id = '{old['id']}'")
        await sql(service, f"UPDATE jobs SET created_at = '{long_ago}' WHERE id = '{waiting['id']}'")
        async with service.watch("topics=jobs") as watcher:
            async with database_of(service) as database:
                await Cleanup(database, "worker", Retention(12, 1_000, 10**9, job_hours=24)).clean()
            deleted = await watcher.until(lambda frame: frame["operation"] == "delete")
            assert deleted["data"] == {"id": old["id"]}
        assert (await alice.http.get(f"/jobs/{old['id']}")).status_code == 404
        listed = {job["id"] for job in (await alice.http.get(f"/jobs?user_id={alice.id}")).json()}
        assert listed == {new["id"], waiting["id"]}


async def test_the_jobs_of_a_deactivated_account_are_cancelled(service: Service) -> None:
    async with service.person() as alice, service.admin() as admin, service.watch("topics=jobs") as watcher:
        waiting = await alice.generate("movies", 100, "?rate=0.1")
        running = await alice.generate("movies", 1_000_000, "?batch_size=10")
        assert (await admin.http.post(f"/admin/users/{alice.id}/deactivate")).is_success
        cancelled: dict[str, Any] = {}
        while len(cancelled) < 2:
            frame = await watcher.until(
                lambda frame: frame.get("data", {}).get("state") == "cancelled" and "seq" in frame
            )
            cancelled[frame["data"]["id"]] = frame["data"]
        assert cancelled.keys() == {waiting["id"], running["id"]}
        for job in cancelled.values():
            assert (await admin.http.get(f"/jobs/{job['id']}")).json() == job
