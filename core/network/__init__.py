"""Client addresses, fair shares for clients, and the hosts that requests may name."""
