"""The command line: one file for each command or close family of commands."""
