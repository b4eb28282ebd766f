"""Clients of the service, each usable on its own, and the conformance scenarios that every client must pass."""
