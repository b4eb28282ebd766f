"""The command `marquee` with its subcommands serve, migrate, create-admin, seed and new-epoch."""
