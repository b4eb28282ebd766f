"""Keys of our own in the scope of an ASGI request."""

ROOT = "marquee.root"  # the path under which clients reach the service: ROOT_PATH, such as "/marquee", or ""
PREFIX = "marquee.prefix"  # what URLs in responses begin with: ROOT, and "/api/v1" if the request's path had it
LIMIT = "marquee.limit"  # the outcome of the rate limits, for the response headers
SOCKET = "marquee.socket"  # present when the request came over a websocket
IDENTITY = "marquee.identity"  # with SOCKET: the identity of that websocket, or None
