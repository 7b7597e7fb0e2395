"""The command line: each command, what it shows, and what a terminal needs."""
