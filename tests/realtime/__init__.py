"""The websocket, its subscriptions, the feed, presence and server-sent events."""
