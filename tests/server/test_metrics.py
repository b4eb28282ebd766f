"""What `/metrics` reports, and who may read it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from core import metrics
from tests.support.backends import SQLITE_ONLY
from tests.support.documents import bare, rows_of, text_of
from tests.support.metrics import metric, metric_becomes, metrics_of
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import Service, eventually


async def grows(service: Service, name: str, seconds: float = 30.0, **labels: str) -> None:
    async def has_grown() -> bool:
        return await metric(service, name, **labels) > 0

    await eventually(has_grown, f"{name} grows", seconds)


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    documented = {bare(cells[0]): (cells[1], cells[2]) for cells in rows_of(text_of("docs/operations.md"), "metric")}
    found = {}
    for collector in metrics.REGISTRY._collector_to_names:
        for family in collector.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = getattr(collector, "_labelnames", ())
            found[name] = (family.type, ", ".join(f"`{label}`" for label in labels))
    assert documented == found


def test_metric_names_have_a_prefix_and_a_unit() -> None:
    for family in metrics.REGISTRY.collect():
        assert re.fullmatch(r"marquee_[a-z_]+", family.name)
        assert family.documentation
        if family.type == "histogram":
            assert family.name.endswith("_seconds")


@SQLITE_ONLY
async def test_requests_are_counted_by_the_template_of_their_path(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice:
        movie = await alice.add()
        for path in (f"/movies/{movie['id']}", f"/api/v1/movies/{movie['id']}/", "/movies/999999999", "/no/such/page"):
            await alice.http.get(path)
        await alice.http.request("BREW", "/movies")
    found = await metrics_of(service)
    for method, route, status, count in (
        *(("POST", "/movies", "201", 1), ("GET", "/movies/{id}", "200", 2)),
        *(("GET", "/movies/{id}", "404", 1), ("GET", "unmatched", "404", 1)),
    ):
        labels = (("method", method), ("route", route), ("status", status))
        assert found["marquee_http_requests_total", labels] == count
    assert not any("/no/such" in str(labels) for _, labels in found)
    assert not any("BREW" in str(labels) for _, labels in found), "unknown methods have no series"
    seconds = found["marquee_http_request_seconds_count", (("method", "GET"), ("route", "/movies/{id}"))]
    assert seconds == 3
    assert found["marquee_commits_total", ()] > 0


@SQLITE_ONLY
async def test_websockets_are_counted_while_open_and_by_close_code(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.watch(), service.watch() as second:
        assert await metric(service, "marquee_websocket_connections") == 2
        assert await metric(service, "marquee_websocket_accepted_total") == 2
        handshake = {"method": "GET", "route": "/ws"}
        assert await metric(service, "marquee_http_requests_total", status="101", **handshake) == 2
        await second.socket.close(4123)
        second.socket.transport.abort()
    await metric_becomes(service, "marquee_websocket_connections", 0)
    assert await metric(service, "marquee_websocket_closed_total", code="1000") == 1
    assert await metric(service, "marquee_websocket_closed_total", code="other") == 1
    async with service.watch() as third:
        await third.send("\N{BELL}" * 300_000)
        await third.socket.wait_closed()
    await metric_becomes(service, "marquee_websocket_closed_total", 1, code="1009")
    async with httpx.AsyncClient() as client:
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
        assert (await client.get(f"{service.url}/ws?since=x", headers=upgrade)).status_code == 422
    assert await metric(service, "marquee_http_requests_total", status="422", **handshake) == 1
    assert await metric(service, "marquee_websocket_accepted_total") == 3


@SQLITE_ONLY
async def test_frames_are_counted_for_each_group_and_each_socket(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.watch() as first, service.watch() as second, service.watch() as third:
        before = await metrics_of(service)
        await alice.add()
        for watcher in (first, second, third):
            await watcher.expect("add")
        after = await metrics_of(service)

        def grown(name: str) -> float:
            return after[name, ()] - before[name, ()]

        assert grown("marquee_hub_frames_total") == 1
        assert grown("marquee_hub_deliveries_total") == 3
        assert grown("marquee_hub_written_bytes_total") > 3 * 100
        assert after["marquee_subscriptions", ()] == 3
        sources = [("marquee_feed_events_total", (("source", source),)) for source in ("bus", "log")]
        assert sum(after[source] - before[source] for source in sources) == 1
        async with service.watch(f"since={await service.position(0)}") as late:
            await late.expect("add")
        assert await metric(service, "marquee_catch_ups_total") > before["marquee_catch_ups_total", ()]
    await metric_becomes(service, "marquee_subscriptions", 0)


@SQLITE_ONLY
async def test_metrics_show_jobs_and_the_position_in_the_log(service: Service) -> None:
    before = await metric(service, "marquee_rows_generated_total", kind="generate_movies")
    async with service.person() as alice, service.watch("topics=movies") as watcher:
        job = await alice.generate("movies", 600, "?rate=400&batch_size=100")
        await watcher.expect("add_bulk")
        assert await metric(service, "marquee_jobs_running") >= 1
        await alice.job_ended(job["id"])
        await metric_becomes(service, "marquee_jobs_running", 0)
        assert await metric(service, "marquee_rows_generated_total", kind="generate_movies") == before + 600

        async def has_reached() -> bool:
            return await metric(service, "marquee_feed_seq") >= watcher.seqs[-1]

        await eventually(has_reached, "the feed has reached the newest event", 5)


async def test_metrics_show_a_bus_outage(postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path) -> None:
    with Service(postgres.create_database(), own_redis.url, tmp_path).running() as service:
        async with Redis.from_url(own_redis.url) as client:
            await eventually(client.pubsub_channels, "the worker has subscribed")
        with own_redis.down():
            async with service.person() as alice:
                await alice.add()
            await grows(service, "marquee_bus_dropped_total", seconds=5, where="unsent")
        await grows(service, "marquee_bus_reconnects_total")


@SQLITE_ONLY
async def test_a_metrics_token_is_required_where_one_is_set(new_service: Callable[..., Service]) -> None:
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
async def test_the_format_follows_the_accept_header(service: Service, accept: str, media_type: str) -> None:
    async with service.anyone() as client:
        answer = await client.get("/metrics", headers={"Accept": accept})
        assert answer.headers["Content-Type"].startswith(media_type)
        assert answer.text.endswith("# EOF\n") == ("openmetrics" in media_type)
        assert "Accept" in answer.headers["vary"].split(", ")
