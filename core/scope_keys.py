"""The keys that this service adds to the scope of an ASGI request."""

# The path under which clients reach the service, such as "/marquee", or an empty string.
ROOT = "marquee.root"
# The beginning of URLs in responses: the value of ROOT, followed by "/api/v1" if the request's path had this prefix.
PREFIX = "marquee.prefix"
# The result of the rate limit check, for the response headers.
LIMIT = "marquee.limit"
# Present if the request came over a websocket.
SOCKET = "marquee.socket"
# The number of bytes of the body that a 304 stands for.
KNOWN_SIZE = "marquee.known_size"
# The name of a document whose body is always the same, so that it is compressed only once.
DOCUMENT = "marquee.document"
# Present if the response must not be compressed.
UNCOMPRESSED = "marquee.uncompressed"
# What was expected, as a sentence. Present only if the handshake of a websocket is invalid.
HANDSHAKE_ERROR = "marquee.handshake_error"
# An extension of our own server: a function in the `extensions` of the scope that aborts the connection.
ABORT = "marquee.abort"
# The identity that uses the websocket, or None. Present only together with SOCKET.
IDENTITY = "marquee.identity"
