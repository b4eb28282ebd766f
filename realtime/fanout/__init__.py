"""From one event to every subscription: the hub, matching filters, snapshots, coalescing."""
