"""Is it alive, is it ready: for people, load balancers and orchestrators."""

from __future__ import annotations

from starlette.responses import Response

import schemas
from routes import rendering
from routes.operation import Call, Operation

_NO_STORE = {"Cache-Control": "no-store"}


async def alive(call: Call) -> Response:
    return rendering.JSONResponse({"status": "ok"}, headers=_NO_STORE)


async def ready(call: Call) -> Response:
    """Degraded is still ready: without its bus the service is slower, not wrong, and all workers share one bus."""
    checks = dict(await call.services.readiness())
    if checks["database"] != "ok" or checks["service"] != "ok":
        status, code = "not_ready", 503
    else:
        status, code = ("ready" if all(check == "ok" for check in checks.values()) else "degraded"), 200
    return rendering.JSONResponse({"status": status, "checks": checks}, code, _NO_STORE)


OPERATIONS = [
    Operation("GET", "/healthz", alive, "Is the process alive", "health", {200: schemas.Health}),
    Operation(
        "GET",
        "/readyz",
        ready,
        "Can it serve",
        "health",
        {200: schemas.Readiness, 503: schemas.Readiness},
        description="`degraded` (200): everything is delivered, more slowly. `not_ready` (503): do not send requests.",
    ),
]
