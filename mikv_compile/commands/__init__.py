"""The subcommands of ``mikv``, a file each. Nothing here imports torch before a command runs: help has to be quick."""
