"""Which subscription receives which event: the hub, filters (matching, changes), and frames (encode, pulse)."""
