"""The outside: mail and the storage of files."""
