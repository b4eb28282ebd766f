"""The ordered stream of events of this process: bus, feed, ring."""
