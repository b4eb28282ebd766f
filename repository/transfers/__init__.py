"""Whole lists, in and out: exports as of one moment, imports, and the history of entities in the event log."""
