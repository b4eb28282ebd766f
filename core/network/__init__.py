"""Client addresses, the shares of clients, and the hosts that requests may name."""
