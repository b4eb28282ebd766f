"""How committed events reach this process: bus (fast, may lose messages), feed (complete, in order), ring (newest)."""
