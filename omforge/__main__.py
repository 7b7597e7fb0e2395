"""`python -m omforge`."""

from omforge.cli.app import main

main()
