"""The bytes that leave the service: JSON frames, their websocket and SSE framing, and the writer of a socket."""
