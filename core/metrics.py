"""The Prometheus metrics and their exposition.

Counting takes a microsecond, so count once per flush, page or request, not once per socket. With several workers, each
worker counts into files in PROMETHEUS_MULTIPROC_DIR, and the worker that is scraped adds up all files. The folder must
exist before this module is imported. The mode of a gauge determines how the values of several workers are combined.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# Clients may close with any code from 3000 to 4999. Codes that neither we nor the standard define share a time series.
OTHER_CODE = "other"
KNOWN_CODES = frozenset((*range(1000, 1016), 4008, 4429, 4501, 4503, 4509))

# Drop the `_created` gauges: they double the number of series.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()


def _counter(name: str, about: str, *labels: str) -> Counter:
    return Counter(f"marquee_{name}", about, labels, registry=REGISTRY)


def _gauge(name: str, about: str, mode: Literal["livesum", "livemax"] = "livesum") -> Gauge:
    return Gauge(f"marquee_{name}", about, registry=REGISTRY, multiprocess_mode=mode)


# --- HTTP

HTTP_REQUESTS = _counter(
    "http_requests",
    "Requests handled, including refused and accepted websocket handshakes; route is the path template",
    "method",
    "route",
    "status",
)
HTTP_SECONDS = Histogram(
    "marquee_http_request_seconds",
    "Time from a request to the end of its response, excluding websockets and event streams",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
HTTP_CONNECTIONS = _gauge("http_connections", "Open HTTP connections, including event streams, excluding websockets")
HTTP_REFUSED = _counter(
    "http_connections_refused",
    "HTTP connections refused or closed, by reason: limit, head_size, head_time, small_chunks, invalid, idle, slow or "
    "unread",
    "reason",
)
HTTP_UNSENT_BYTES = _gauge(
    "http_unsent_bytes", "Bytes of responses waiting in memory for slow HTTP clients, as last counted"
)
LIMITED = _counter(
    "rate_limited", "Requests rejected with 429, by rate limit; a rate limit applies to one or several routes", "limit"
)
LIMITS_NOT_SHARED = _counter(
    "rate_limits_not_shared", "Rate limit hits counted in the memory of one worker because Redis was unavailable"
)

BULK_WAIT_SECONDS = Histogram(
    "marquee_bulk_wait_seconds",
    "Time for which a bulk operation waited for its turn, whether or not it got one",
    buckets=(0.01, 0.1, 0.5, 1, 2.5, 5, 10, 15),
    registry=REGISTRY,
)
BULK_REFUSED = _counter(
    "bulk_refused",
    "Bulk operations and large bodies refused, by reason: turn for a wait that was too long, body for too many large "
    "bodies in progress",
    "reason",
)

# --- websockets

WEBSOCKETS = _gauge("websocket_connections", "Open websockets")
WEBSOCKETS_ACCEPTED = _counter("websocket_accepted", "Websockets accepted")
WEBSOCKETS_CLOSED = _counter(
    "websocket_closed",
    "Websockets closed, by close code, such as 1006 for a lost connection and 4008 for a client that read too slowly",
    "code",
)
WEBSOCKET_UNSENT_BYTES = _gauge(
    "websocket_unsent_bytes",
    "Bytes waiting in memory for slow clients of websockets and event streams, or reserved for them, as last counted",
)
SUBSCRIPTIONS = _gauge("subscriptions", "Open websocket subscriptions, both live and catching up")
STREAMS = _gauge("sse_streams", "Open server-sent event streams")

# --- from the bus and the log to the sockets

FEED_EVENTS = _counter("feed_events", "Events added to a worker's feed, by source: bus or log", "source")
FEED_SEQ = _gauge(
    "feed_seq", "Number of the newest event in the feed; with several workers, the highest of their numbers", "livemax"
)
FEED_LAG = _gauge(
    "feed_lag_events",
    "Number of events in the log that are not in the feed yet; with several workers, the highest of their numbers",
    "livemax",
)
LOG_READS = _counter("log_reads", "Pages of events read from the database")
BUS_DEAF = _gauge("bus_deaf", "Workers that read the log because the shared bus is silent; normally 0")
BUS_DROPPED = _counter("bus_dropped", "Events dropped by the bus and read from the log instead", "where")
BUS_REJECTED = _counter(
    "bus_rejected", "Messages on the shared bus that were rejected because they were not signed with a known secret key"
)
BUS_RECONNECTS = _counter("bus_reconnects", "Reconnections to the shared bus")
HUB_FRAMES = _counter("hub_frames", "Frames built for live subscriptions, once per group of equal subscriptions")
HUB_DELIVERIES = _counter("hub_deliveries", "Frames handed to sockets, counted once per socket")
HUB_BYTES = _counter("hub_written_bytes", "Bytes of frames handed to sockets")
COSTLY_FILTERS = _counter(
    "costly_filters", "Groups of subscriptions that left the hub because their filters cost too much"
)
CATCH_UPS = _counter("catch_ups", "Number of times that a subscription began to catch up from the ring or the log")
RESYNCS = _counter("resyncs", "Resync frames sent, by reason", "reason")
SNAPSHOT_ROWS = _counter("snapshot_rows", "Rows sent in snapshots")

# --- jobs and the database

JOBS_RUNNING = _gauge("jobs_running", "Jobs that occupy a worker's slot")
ROWS_GENERATED = _counter("rows_generated", "Rows stored by jobs", "kind")
MAILS = _counter("mails", "Attempts to send an email, by result: sent, postponed or failed", "result")
COMMITS = _counter("commits", "Transactions committed")
SQLITE_LOG_BYTES = _gauge("sqlite_log_bytes", "Size of SQLite's write-ahead log; 0 on PostgreSQL", "livemax")
READ_TIMEOUTS = _counter(
    "read_timeouts", "Reads stopped at their deadline, by lane: point, list, costly or export", "lane"
)
COMMIT_RETRIES = _counter("commit_retries", "Transaction retries after a conflict or a lost connection")

# Create these labels at import, so that rate() starts at zero.
BULK_REFUSED_TURN = BULK_REFUSED.labels("turn")
BULK_REFUSED_BODY = BULK_REFUSED.labels("body")
FEED_EVENTS_FROM_BUS = FEED_EVENTS.labels("bus")
FEED_EVENTS_FROM_LOG = FEED_EVENTS.labels("log")
BUS_DROPPED_UNSENT = BUS_DROPPED.labels("unsent")  # The bus was unavailable, or its outbox was full.
BUS_DROPPED_UNREAD = BUS_DROPPED.labels("unread")  # The bus's inbox was full.


def request_answered(method: str, route: str, status: int, seconds: float | None) -> None:
    """Count a request. `route` must be a path template, not a request's path, because each value creates a time series.

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
    """Count a closed websocket. Call this once for each call of `websocket_opened`."""
    WEBSOCKETS.dec()
    WEBSOCKETS_CLOSED.labels(str(code) if code in KNOWN_CODES else OTHER_CODE).inc()


@dataclass(frozen=True, slots=True)
class Exposition:
    """The response to a scrape of the metrics."""

    content: bytes
    media_type: str


def exposition(accept: str) -> Exposition:
    """Return the metrics of all workers in the format that the Accept header requests: text or OpenMetrics."""
    registry = REGISTRY
    if FOLDER_VARIABLE in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    encode, media_type = choose_encoder(accept)
    return Exposition(encode(registry), media_type)


def forget_worker(pid: int, folder: str) -> None:
    """Remove the gauges of a dead worker, but keep its counters."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
