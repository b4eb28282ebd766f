"""The event log over HTTP: pages of frames, and streams of server-sent events."""
