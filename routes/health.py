"""Liveness, readiness and metrics, for load balancers, orchestrators and Prometheus."""

from __future__ import annotations

import asyncio
import hmac

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import schemas
from core import metrics
from core.error_bodies import PROBLEM_JSON, VARY
from core.errors import Unauthenticated
from routes.http import rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import Call, Operations

_NO_STORE = {"Cache-Control": "no-store"}

operations = Operations("health")


@operations.get("/healthz", "Check that the process is alive", {200: schemas.Health}, limit_group=LimitGroup.UNLIMITED)
async def alive(call: Call[None, None, None]) -> Response:
    return rendering.JSONResponse({"status": "ok"}, headers=_NO_STORE)


@operations.get(
    "/readyz",
    "Check that the process can serve requests",
    {200: schemas.Readiness, 503: schemas.Readiness},
    description="`degraded` (200): everything is delivered, but more slowly. `not_ready` (503): send no requests.",
    limit_group=LimitGroup.UNLIMITED,
)
async def ready(call: Call[None, None, None]) -> Response:
    """Respond with 200 even when degraded, because without the bus the service is only slower.

    All workers share the bus, so a 503 would take all of them out of service.
    """
    checks = dict(await call.services.readiness())
    failed = [f"{name}: {check}" for name, check in checks.items() if check != "ok"]
    if checks["database"] == checks["service"] == "ok":
        status = "degraded" if failed else "ready"
        return rendering.JSONResponse({"status": status, "checks": checks}, headers=_NO_STORE)
    if rendering.client_prefers(call.headers, PROBLEM_JSON):
        return rendering.error_response(503, "; ".join(failed), call.headers, _NO_STORE, checks=checks)
    return rendering.JSONResponse({"status": "not_ready", "checks": checks}, 503, {**_NO_STORE, "Vary": VARY})


async def show_metrics(request: Request) -> Response:
    """Respond with the metrics. This is not an operation, because it has its own token and Prometheus's format."""
    expected: str | None = request.state.metrics_token
    if expected is not None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), expected.encode()):
            raise Unauthenticated("Expected the header Authorization: Bearer <METRICS_TOKEN>")
    # The metrics are collected in a thread, because with many workers there are many files to add up.
    found = await asyncio.to_thread(metrics.exposition, request.headers.get("accept", ""))
    return Response(found.content, headers={**_NO_STORE, "Content-Type": found.media_type, "Vary": VARY})


PAGES: list[BaseRoute] = [Route("/metrics", show_metrics)]
