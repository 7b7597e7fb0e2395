"""`python -m omforge`."""

from omforge.cli import main

main()
