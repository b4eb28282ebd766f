"""Client addresses, fair shares and turns for clients, and the hosts that requests may name."""
