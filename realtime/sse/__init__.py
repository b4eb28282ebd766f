"""The event log over HTTP: pages of frames, and server-sent events that continue."""
