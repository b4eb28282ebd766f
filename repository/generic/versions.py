"""What `If-Match` allows."""

from __future__ import annotations

# The versions that If-Match allows; None when it allows any.
IfMatch = frozenset[int] | None
