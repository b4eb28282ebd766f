"""One websocket from handshake to close: endpoint and connection, with one context and one registry per process."""
