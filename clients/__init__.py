"""Clients of the service, each usable on its own, and the run of scenarios that every client has to pass."""
