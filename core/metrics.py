"""What is counted, for Prometheus: the metrics, and the page that shows them.

Counting costs a microsecond: count once a flush, a page or a request, not once a socket. With several workers each
counts into files in PROMETHEUS_MULTIPROC_DIR, and whichever is asked adds them up; the folder must be there before
this module is imported. Gauges say by their mode what the sum over workers is.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# Any client may close with any number from 3000 to 4999: what is not ours or the standard's is one series.
OTHER_CODE = "other"
KNOWN_CODES = frozenset((*range(1000, 1016), 4008, 4429, 4501, 4503, 4509))

# A gauge a counter, only to say when it was made: twice the series for nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()

# --- HTTP

HTTP_REQUESTS = Counter(
    "marquee_http_requests",
    "Requests answered, refused and accepted websocket handshakes included; route is the template of the path",
    ["method", "route", "status"],
    registry=REGISTRY,
)
HTTP_SECONDS = Histogram(
    "marquee_http_request_seconds",
    "Time from a request to the end of its answer, without websockets and streams",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)

LIMITED = Counter(
    "marquee_rate_limited",
    "Requests refused with 429 because their client came too often, by limit: a group of routes or one route",
    ["limit"],
    registry=REGISTRY,
)
LIMITS_UNCHECKED = Counter(
    "marquee_rate_limits_unchecked", "Requests that passed uncounted because Redis was away", registry=REGISTRY
)

# --- websockets

WEBSOCKETS = Gauge(
    "marquee_websocket_connections", "Websockets open now", registry=REGISTRY, multiprocess_mode="livesum"
)
WEBSOCKETS_ACCEPTED = Counter("marquee_websocket_accepted", "Websockets accepted", registry=REGISTRY)
WEBSOCKETS_CLOSED = Counter(
    "marquee_websocket_closed",
    "Websockets that ended, by close code; 1006 is an end without one, 4008 a reader that was too slow",
    ["code"],
    registry=REGISTRY,
)
SUBSCRIPTIONS = Gauge(
    "marquee_subscriptions",
    "Subscriptions of websockets now, live and catching up",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
STREAMS = Gauge(
    "marquee_sse_streams", "Server-sent event streams open now", registry=REGISTRY, multiprocess_mode="livesum"
)

# --- from the bus and the log to the sockets

FEED_EVENTS = Counter(
    "marquee_feed_events",
    "Events taken into the stream of a worker, by where they came from: bus or log",
    ["source"],
    registry=REGISTRY,
)
FEED_SEQ = Gauge(
    "marquee_feed_seq",
    "Number of the newest event in the stream; of several workers the one furthest ahead",
    registry=REGISTRY,
    multiprocess_mode="livemax",
)
FEED_LAG = Gauge(
    "marquee_feed_lag_events",
    "Events that the log is known to have and the stream has not; of several workers the one furthest behind",
    registry=REGISTRY,
    multiprocess_mode="livemax",
)
LOG_READS = Counter("marquee_log_reads", "Pages of events read from the database", registry=REGISTRY)
BUS_DEAF = Gauge(
    "marquee_bus_deaf",
    "Workers whose shared bus is silent, so that they read the log instead; 0 when all is well",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
BUS_DROPPED = Counter(
    "marquee_bus_dropped",
    "Events that the bus did not take or could not keep; they are read from the log",
    ["where"],
    registry=REGISTRY,
)
BUS_RECONNECTS = Counter("marquee_bus_reconnects", "Subscriptions to the shared bus after the first", registry=REGISTRY)
HUB_FRAMES = Counter(
    "marquee_hub_frames", "Frames built for live subscriptions, once for each group of equal ones", registry=REGISTRY
)
HUB_DELIVERIES = Counter(
    "marquee_hub_deliveries", "Frames handed to sockets: one for each frame and socket", registry=REGISTRY
)
HUB_BYTES = Counter("marquee_hub_written_bytes", "Bytes of frames handed to sockets", registry=REGISTRY)
CATCH_UPS = Counter(
    "marquee_catch_ups", "Times that a subscription went on from the ring or the log", registry=REGISTRY
)
RESYNCS = Counter("marquee_resyncs", "Watchers told to start over, by reason", ["reason"], registry=REGISTRY)
SNAPSHOT_ROWS = Counter("marquee_snapshot_rows", "Rows sent in snapshots", registry=REGISTRY)

# --- jobs and the database

JOBS_RUNNING = Gauge("marquee_jobs_running", "Jobs at work now", registry=REGISTRY, multiprocess_mode="livesum")
ROWS_GENERATED = Counter("marquee_rows_generated", "Rows stored by jobs", ["kind"], registry=REGISTRY)
MAILS = Counter(
    "marquee_mails", "Mails tried, by what became of them: sent, postponed or failed", ["result"], registry=REGISTRY
)
COMMITS = Counter("marquee_commits", "Transactions committed", registry=REGISTRY)
COMMIT_RETRIES = Counter(
    "marquee_commit_retries", "Transactions that the database refused and that were run again", registry=REGISTRY
)


# Series of which it is known that there will be some start at nought, so that a rate has a beginning.
FEED_EVENTS_FROM_BUS = FEED_EVENTS.labels("bus")
FEED_EVENTS_FROM_LOG = FEED_EVENTS.labels("log")
BUS_DROPPED_UNSENT = BUS_DROPPED.labels("unsent")  # the outbox was full, or the bus was away
BUS_DROPPED_UNREAD = BUS_DROPPED.labels("unread")  # the inbox was full


def request_answered(method: str, route: str, status: int, seconds: float | None) -> None:
    """`route` is a template, never a path as it was sent: each text is a series of its own, for ever. Status 0 is a
    client that went away before it was answered.
    """
    method = method if method in HTTP_METHODS else "other"
    HTTP_REQUESTS.labels(method, route, str(status)).inc()
    if seconds is not None:
        HTTP_SECONDS.labels(method, route).observe(seconds)


def websocket_opened() -> None:
    WEBSOCKETS_ACCEPTED.inc()
    WEBSOCKETS.inc()


def websocket_closed(code: int) -> None:
    """Once for each `websocket_opened`."""
    WEBSOCKETS.dec()
    WEBSOCKETS_CLOSED.labels(str(code) if code in KNOWN_CODES else OTHER_CODE).inc()


def page(accept: str) -> tuple[bytes, str]:
    """The metrics of all workers, and the media type of the format that `accept` asks for: text or OpenMetrics."""
    registry = REGISTRY
    if FOLDER_VARIABLE in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


def forget_worker(pid: int, folder: str) -> None:
    """Its gauges; what it counted stays."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
