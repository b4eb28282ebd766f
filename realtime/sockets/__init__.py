"""One websocket: handshake, messages, replies, the registry of all connections."""
