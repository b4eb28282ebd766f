"""What `/metrics` counts, who may read it, and that several workers answer as one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from core import metrics
from tests.support.backends import SQLITE_ONLY
from tests.support.documents import bare, rows_of, text_of
from tests.support.servers import PostgresServer, RedisServer
from tests.support.service import Service, eventually

Sample = tuple[str, tuple[tuple[str, str], ...]]


async def read(service: Service) -> dict[Sample, float]:
    async with service.anyone() as client:
        answer = await client.get("/metrics")
        assert answer.status_code == 200
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }


async def value(service: Service, name: str, **labels: str) -> float:
    return (await read(service)).get((name, tuple(sorted(labels.items()))), 0.0)


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    documented = {bare(cells[0]): (cells[1], cells[2]) for cells in rows_of(text_of("docs/operations.md"), "metric")}
    found = {}
    for collector in metrics.REGISTRY._collector_to_names:
        for metric in collector.collect():
            name = metric.name + ("_total" if metric.type == "counter" else "")
            labels = getattr(collector, "_labelnames", ())
            found[name] = (metric.type, ", ".join(f"`{label}`" for label in labels))
    assert documented == found


def test_names_say_whose_they_are_and_in_which_unit() -> None:
    for metric in metrics.REGISTRY.collect():
        assert re.fullmatch(r"marquee_[a-z_]+", metric.name)
        assert metric.documentation
        if metric.type == "histogram":
            assert metric.name.endswith("_seconds")


@SQLITE_ONLY
async def test_requests_are_counted_by_the_template_of_their_path(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice:
        movie = await alice.add()
        for path in (f"/movies/{movie['id']}", f"/api/v1/movies/{movie['id']}/", "/movies/999999999", "/no/such/page"):
            await alice.http.get(path)
        await alice.http.request("BREW", "/movies")
    request = "marquee_http_requests_total"
    found = await read(service)

    def count(method: str, route: str, status: int) -> float:
        return found.get((request, (("method", method), ("route", route), ("status", str(status)))), 0.0)

    assert count("POST", "/movies", 201) == 1
    assert count("GET", "/movies/{id}", 200) == 2
    assert count("GET", "/movies/{id}", 404) == 1
    assert count("GET", "unmatched", 404) == 1
    assert not any("/no/such" in str(labels) for _, labels in found)
    assert not any("BREW" in str(labels) for _, labels in found), "a series for whatever method a client makes up"
    seconds = found["marquee_http_request_seconds_count", (("method", "GET"), ("route", "/movies/{id}"))]
    assert seconds == 3
    assert found["marquee_commits_total", ()] > 0


@SQLITE_ONLY
async def test_websockets_are_counted_while_open_and_by_the_code_of_their_end(
    new_service: Callable[..., Service],
) -> None:
    service = new_service().start()
    async with service.watch(), service.watch() as second:
        assert await value(service, "marquee_websocket_connections") == 2
        assert await value(service, "marquee_websocket_accepted_total") == 2
        handshake = {"method": "GET", "route": "/ws"}
        assert await value(service, "marquee_http_requests_total", status="101", **handshake) == 2
        await second.socket.close(4123)
        second.socket.transport.abort()
    await eventually(lambda: _is(service, "marquee_websocket_connections", 0), "both are gone")
    assert await value(service, "marquee_websocket_closed_total", code="1000") == 1
    assert await value(service, "marquee_websocket_closed_total", code="other") == 1
    async with service.watch() as third:
        await third.send("\N{BELL}" * 300_000)
        await third.socket.wait_closed()
    await eventually(lambda: _is(service, "marquee_websocket_closed_total", 1, code="1009"), "our own code")
    async with httpx.AsyncClient() as client:
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        assert (await client.get(f"{service.url}/ws?since=x", headers=upgrade)).status_code == 422
    assert await value(service, "marquee_http_requests_total", status="422", **handshake) == 1
    assert await value(service, "marquee_websocket_accepted_total") == 3


@SQLITE_ONLY
async def test_what_goes_out_is_counted_once_a_group_and_once_a_socket(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.watch() as first, service.watch() as second, service.watch() as third:
        before = await read(service)
        await alice.add()
        for watcher in (first, second, third):
            await watcher.expect("add")
        after = await read(service)

        def grown(name: str) -> float:
            return after[name, ()] - before[name, ()]

        assert grown("marquee_hub_frames_total") == 1
        assert grown("marquee_hub_deliveries_total") == 3
        assert grown("marquee_hub_written_bytes_total") > 3 * 100
        assert after["marquee_subscriptions", ()] == 3
        sources = [("marquee_feed_events_total", (("source", source),)) for source in ("bus", "log")]
        assert sum(after[source] - before[source] for source in sources) == 1
        async with service.watch("since=0") as late:
            await late.expect("add")
        assert await value(service, "marquee_catch_ups_total") > before["marquee_catch_ups_total", ()]
    await eventually(lambda: _is(service, "marquee_subscriptions", 0), "nobody watches")


async def _is(service: Service, name: str, expected: float, **labels: str) -> bool:
    return await value(service, name, **labels) == expected


async def test_jobs_and_the_place_in_the_log_are_shown(service: Service) -> None:
    before = await value(service, "marquee_rows_generated_total", kind="generate_movies")
    async with service.person() as alice, service.watch("topics=movies") as watcher:
        job = await alice.generate("movies", 600, "?rate=400&batch_size=100")
        await watcher.expect("add_bulk")
        assert await value(service, "marquee_jobs_running") >= 1
        await alice.job_ended(job["id"])
        await eventually(lambda: _is(service, "marquee_jobs_running", 0), "the job is over")
        assert await value(service, "marquee_rows_generated_total", kind="generate_movies") == before + 600

        async def has_come() -> bool:
            return await value(service, "marquee_feed_seq") >= watcher.seqs[-1]

        await eventually(has_come, "the number of the newest event", 5)


async def test_a_silent_bus_is_shown(postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path) -> None:
    with Service(postgres.create_database(), own_redis.url, tmp_path).running() as service:
        await eventually(lambda: _is(service, "marquee_bus_deaf", 0), "all is well")
        with own_redis.frozen():
            await eventually(lambda: _is(service, "marquee_bus_deaf", 1), "it says so", 4)
        await eventually(lambda: _is(service, "marquee_bus_deaf", 0), "all is well again")
        with own_redis.down():
            async with service.person() as alice:
                await alice.add()
            await eventually(lambda: _has(service, "marquee_bus_dropped_total", where="unsent"), "it says so", 5)
        await eventually(lambda: _has(service, "marquee_bus_reconnects_total"), "it came back")


async def _has(service: Service, name: str, **labels: str) -> bool:
    return await value(service, name, **labels) > 0


@SQLITE_ONLY
async def test_with_a_token_only_who_sends_it_may_read(new_service: Callable[..., Service]) -> None:
    service = new_service(METRICS_TOKEN="geheim").start()
    async with service.anyone() as client:
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic geheim"}):
            refused = await client.get("/metrics", headers=wrong)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert "marquee_" not in refused.text
        assert (await client.get("/metrics", headers={"Authorization": "Bearer geheim"})).status_code == 200


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
    ],
)
@SQLITE_ONLY
async def test_the_format_is_the_one_that_is_asked_for(service: Service, accept: str, media_type: str) -> None:
    async with service.anyone() as client:
        answer = await client.get("/metrics", headers={"Accept": accept})
        assert answer.headers["Content-Type"].startswith(media_type)
        assert answer.text.endswith("# EOF\n") == ("openmetrics" in media_type)
