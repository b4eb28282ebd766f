"""The event log over HTTP: pages and server-sent events."""
