"""The Prometheus metrics and their exposition.

Counting costs a microsecond: count once per flush, page or request, not once per socket. With several workers, each
one counts into files in PROMETHEUS_MULTIPROC_DIR and the one that is scraped adds them up; the folder must exist before
this module is imported. The mode of a gauge says how the values of several workers are combined.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# Clients may close with any number from 3000 to 4999. All codes that neither we nor the standard define share a series.
OTHER_CODE = "other"
KNOWN_CODES = frozenset((*range(1000, 1016), 4008, 4429, 4501, 4503, 4509))

# Drop the `_created` gauges: they double the number of series.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()

# --- HTTP

HTTP_REQUESTS = Counter(
    "marquee_http_requests",
    "Requests handled, including refused and accepted websocket handshakes; route is the path template",
    ["method", "route", "status"],
    registry=REGISTRY,
)
HTTP_SECONDS = Histogram(
    "marquee_http_request_seconds",
    "Time from a request to the end of its response, without websockets and event streams",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)

LIMITED = Counter(
    "marquee_rate_limited",
    "Requests rejected with 429, by rate limit: a group of routes or one route",
    ["limit"],
    registry=REGISTRY,
)
LIMITS_UNCHECKED = Counter(
    "marquee_rate_limits_unchecked", "Requests not counted because Redis was unreachable", registry=REGISTRY
)

# --- websockets

WEBSOCKETS = Gauge("marquee_websocket_connections", "Open websockets", registry=REGISTRY, multiprocess_mode="livesum")
WEBSOCKETS_ACCEPTED = Counter("marquee_websocket_accepted", "Websockets accepted", registry=REGISTRY)
WEBSOCKETS_CLOSED = Counter(
    "marquee_websocket_closed",
    "Websockets closed, by close code; 1006 is a connection lost without one, 4008 a client that read too slowly",
    ["code"],
    registry=REGISTRY,
)
SUBSCRIPTIONS = Gauge(
    "marquee_subscriptions",
    "Open websocket subscriptions, live and catching up",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
STREAMS = Gauge("marquee_sse_streams", "Open server-sent event streams", registry=REGISTRY, multiprocess_mode="livesum")

# --- from the bus and the log to the sockets

FEED_EVENTS = Counter(
    "marquee_feed_events",
    "Events taken into the feed of a worker, by source: bus or log",
    ["source"],
    registry=REGISTRY,
)
FEED_SEQ = Gauge(
    "marquee_feed_seq",
    "Number of the newest event in the feed; with several workers, of the one furthest ahead",
    registry=REGISTRY,
    multiprocess_mode="livemax",
)
FEED_LAG = Gauge(
    "marquee_feed_lag_events",
    "Events in the log that the feed has not taken yet; with several workers, of the one furthest behind",
    registry=REGISTRY,
    multiprocess_mode="livemax",
)
LOG_READS = Counter("marquee_log_reads", "Pages of events read from the database", registry=REGISTRY)
BUS_DEAF = Gauge(
    "marquee_bus_deaf",
    "Workers that read the log because their shared bus is silent; 0 when all is well",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
BUS_DROPPED = Counter(
    "marquee_bus_dropped",
    "Events dropped by the bus; they are read from the log",
    ["where"],
    registry=REGISTRY,
)
BUS_RECONNECTS = Counter("marquee_bus_reconnects", "Reconnections to the shared bus", registry=REGISTRY)
HUB_FRAMES = Counter(
    "marquee_hub_frames", "Frames built for live subscriptions, once per group of equal ones", registry=REGISTRY
)
HUB_DELIVERIES = Counter(
    "marquee_hub_deliveries", "Frames handed to sockets, counted once per socket", registry=REGISTRY
)
HUB_BYTES = Counter("marquee_hub_written_bytes", "Bytes of frames handed to sockets", registry=REGISTRY)
CATCH_UPS = Counter(
    "marquee_catch_ups", "Times that a subscription continued from the ring or the log", registry=REGISTRY
)
RESYNCS = Counter("marquee_resyncs", "Clients told to start over, by reason", ["reason"], registry=REGISTRY)
SNAPSHOT_ROWS = Counter("marquee_snapshot_rows", "Rows sent in snapshots", registry=REGISTRY)

# --- jobs and the database

JOBS_RUNNING = Gauge("marquee_jobs_running", "Running jobs", registry=REGISTRY, multiprocess_mode="livesum")
ROWS_GENERATED = Counter("marquee_rows_generated", "Rows stored by jobs", ["kind"], registry=REGISTRY)
MAILS = Counter(
    "marquee_mails", "Attempts to send an email, by result: sent, postponed or failed", ["result"], registry=REGISTRY
)
COMMITS = Counter("marquee_commits", "Transactions committed", registry=REGISTRY)
COMMIT_RETRIES = Counter("marquee_commit_retries", "Transactions run again after a conflict", registry=REGISTRY)


# Create these labels at import, so that rate() starts at zero.
FEED_EVENTS_FROM_BUS = FEED_EVENTS.labels("bus")
FEED_EVENTS_FROM_LOG = FEED_EVENTS.labels("log")
BUS_DROPPED_UNSENT = BUS_DROPPED.labels("unsent")  # the outbox was full, or the bus was away
BUS_DROPPED_UNREAD = BUS_DROPPED.labels("unread")  # the inbox was full


def request_answered(method: str, route: str, status: int, seconds: float | None) -> None:
    """Count a request. `route` must be a path template, never a path as sent: each value is a series of its own.

    Status 0 stands for a client that disconnected before the response.
    """
    method = method if method in HTTP_METHODS else "other"
    HTTP_REQUESTS.labels(method, route, str(status)).inc()
    if seconds is not None:
        HTTP_SECONDS.labels(method, route).observe(seconds)


def websocket_opened() -> None:
    WEBSOCKETS_ACCEPTED.inc()
    WEBSOCKETS.inc()


def websocket_closed(code: int) -> None:
    """Count a close. Call it once for each `websocket_opened`."""
    WEBSOCKETS.dec()
    WEBSOCKETS_CLOSED.labels(str(code) if code in KNOWN_CODES else OTHER_CODE).inc()


@dataclass(frozen=True, slots=True)
class Exposition:
    """The metrics as a scrape receives them."""

    content: bytes
    media_type: str


def exposition(accept: str) -> Exposition:
    """Return the metrics of all workers, as text or as OpenMetrics, as the header `accept` asks for."""
    registry = REGISTRY
    if FOLDER_VARIABLE in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    encode, media_type = choose_encoder(accept)
    return Exposition(encode(registry), media_type)


def forget_worker(pid: int, folder: str) -> None:
    """Remove the gauges of a dead worker. Its counters stay."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
