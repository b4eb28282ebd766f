"""One websocket from handshake to close: endpoint, connection, and per process the context and the registry."""
