"""The subcommands of the program, one file each (the sweeps share one)."""
