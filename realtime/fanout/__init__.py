"""Which subscription gets what: hub, then matching and changes for filters, encode and pulse for what is sent."""
