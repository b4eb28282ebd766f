"""The background edge: jobs run under leases, emails, and periodic clean-up."""
