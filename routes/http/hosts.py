"""Checks of the header `Host`, against DNS rebinding, and of `Origin`, for web pages of other origins (CORS)."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from core import scope_keys
from core.errors import BadRequest, Forbidden, MisdirectedRequest, Problem
from core.logs import WarnOnce
from core.network.hosts import AllowedHosts, host_of, origin_refusal
from routes.http.rendering import error_response, problem_response

# Probes and scrapers address a pod or a container by whatever name or address is current. After DNS rebinding, a page
# can learn from these paths only the health of the service, and its metrics unless METRICS_TOKEN protects them.
PROBED = frozenset({"/healthz", "/readyz", "/metrics"})
log = structlog.get_logger("http")


class HostCheck:
    """Rejects with 421 requests for hosts that are not `allowed`, and with 400 requests without one valid `Host`."""

    def __init__(self, app: ASGIApp, allowed: AllowedHosts) -> None:
        self.app = app
        self._allowed = allowed
        self._warn = WarnOnce(log, "host rejected")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A request over a websocket has the handshake's host, which has already been checked.
        if scope["type"] in ("http", "websocket") and scope_keys.SOCKET not in scope:
            try:
                self._check(scope)
            except Problem as problem:
                response = problem_response(problem, Headers(scope=scope))
                if scope["type"] == "websocket":
                    await WebSocket(scope, receive, send).send_denial_response(response)
                else:
                    await response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raise BadRequest for a missing or invalid `Host`, and MisdirectedRequest for a host that is not allowed."""
        given = [value for name, value in scope["headers"] if name == b"host"]
        is_probe = scope["path"] in PROBED
        if not given and is_probe and scope.get("http_version") == "1.0":
            return  # HTTP/1.0 does not require Host, and some load balancers probe with HTTP/1.0
        if len(given) != 1:
            raise BadRequest(f"Expected exactly one Host header, got {len(given)}")
        host = host_of(given[0].decode("latin-1").strip())
        if host is None:
            raise BadRequest("Expected a host and, optionally, a port in the Host header")
        if not is_probe and not self._allowed.allow(host):
            hint = f"If this host is correct, add {host} to the ALLOWED_HOSTS setting"
            self._warn(host, hint=hint)
            addresses = " any IP address," if self._allowed.allows_addresses else ""
            raise MisdirectedRequest(
                f"The host {host} is not served. Expected localhost, the address that the service listens on,"
                f"{addresses} the host of PUBLIC_URL, or one in ALLOWED_HOSTS. {hint}"
            )


class Cors(CORSMiddleware):
    """Starlette's CORS middleware, except that the response to a rejected preflight request gives the reason, in the
    shape of all errors.
    """

    def __init__(
        self,
        app: ASGIApp,
        allow_origins: Sequence[str],
        allow_methods: Sequence[str],
        allow_headers: Sequence[str],
        expose_headers: Sequence[str],
    ) -> None:
        super().__init__(app, allow_origins, allow_methods, allow_headers, expose_headers=expose_headers)
        self._warn = WarnOnce(log, "origin rejected")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_preflight = scope["type"] == "http" and scope["method"] == "OPTIONS"
        if self.allow_origins or is_preflight:
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        origin = request_headers["origin"]
        if self.is_allowed_origin(origin):
            response = super().preflight_response(request_headers)
            if response.status_code < 400:
                return response
            # Starlette rejects the method or the headers with plain text.
            kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            return error_response(response.status_code, bytes(response.body).decode(), request_headers, kept)
        hint = origin_refusal(origin, request_headers.get("host"))
        self._warn(origin, hint=hint)
        return problem_response(Forbidden(hint, {"Vary": self.preflight_headers["Vary"]}), request_headers)
