"""`python -m omforge`."""

from omforge.cli.entry import main

main()
