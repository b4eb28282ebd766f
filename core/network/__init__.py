"""Addresses of clients, and the hosts that requests may name."""
