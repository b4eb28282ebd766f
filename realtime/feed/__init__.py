"""How committed events reach this process: bus (fast, but lossy), feed (complete, in order), ring (newest events)."""
