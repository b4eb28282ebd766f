"""Rows as files: CSV and NDJSON, written by exports and read by imports."""
