"""The command `marquee`: serve, migrate, create-admin, new-epoch; one file for each group."""
