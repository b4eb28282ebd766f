"""Which subscription receives which event: the hub, matching and changes for filters, encode and pulse for frames."""
