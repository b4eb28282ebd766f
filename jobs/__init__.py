"""The background edge: running jobs under leases, generating rows, and the periodic clean-up."""
