"""Gateways to external systems: email and file storage."""
