"""The socket edge, in the order an event travels: bus, feed and ring, hub, subscription, connection, endpoint."""
