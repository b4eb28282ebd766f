"""Reads and writes the database. Each write appends its events in the same transaction."""
