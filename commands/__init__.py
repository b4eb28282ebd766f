"""The command `marquee` with its subcommands serve, migrate, create-admin, seed, search and new-epoch."""
