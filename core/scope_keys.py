"""Keys of our own in the scope of an ASGI request."""

PREFIX = "marquee.prefix"  # the part of the path that was removed before routing: "/api/v1" or ""
LIMIT = "marquee.limit"  # the outcome of the rate limits, for the response headers
SOCKET = "marquee.socket"  # present when the request came over a websocket
IDENTITY = "marquee.identity"  # with SOCKET: the identity of that websocket, or None
