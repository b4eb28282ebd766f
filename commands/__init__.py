"""The command `marquee` with its subcommands serve, migrate, create-admin and new-epoch."""
