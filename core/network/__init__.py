"""Client addresses, and the hosts that the service is addressed by."""
