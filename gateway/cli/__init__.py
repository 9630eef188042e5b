"""The `peerkv` command: a module or a package for each subcommand. May import everything else in gateway."""
