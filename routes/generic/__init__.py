"""The operations that every resource has."""
