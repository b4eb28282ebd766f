"""The background edge: runs jobs under leases, delivers emails, and cleans up periodically."""
