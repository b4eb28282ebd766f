"""The bodies and fields of users, profiles, credentials and sessions."""
