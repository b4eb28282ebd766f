"""Client addresses, and the hosts that requests may name."""
