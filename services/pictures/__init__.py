"""Uploaded pictures decoded and re-encoded, in a pool of bounded size."""
